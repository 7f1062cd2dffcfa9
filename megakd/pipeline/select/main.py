"""``megakd select``: keep the samples that a teacher likes better than a small reference model does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megakd.config.tree import parse
from megakd.data.scores.sources import decoded_bytes_warning, outdated
from megakd.data.selection import Selection
from megakd.errors import ExitStatus
from megakd.pipeline.select.config import RANKS_ARE_BINNED, SelectConfig
from megakd.pipeline.select.materialize import materialize
from megakd.pipeline.select.preflight import degenerate_warnings, open_scored, quota_warnings
from megakd.pipeline.select.run import Outcome, select
from megakd.work.console import tell
from megakd.work.text_table import columns

HELP = "keep the samples with the largest difference of scores"
_DESCRIPTION = (
    "Keep the best part of the samples of scored datasets: those with the largest NLL_reference - lambda * "
    "NLL_teacher, or any weighted sum of NLLs. Writes a selection, which training reads with --selection and no token "
    "is copied for; --materialize copies the tokens too, for other programs."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(SelectConfig, argv, prog="megakd select", description=_DESCRIPTION)
    sources = open_scored(config)
    outcome = select(config, sources)
    tell(_table(outcome), on="stdout")
    if config.rank_difference:
        tell(RANKS_ARE_BINNED, on="stdout")
    rule = outcome.manifests[0].parameters["rule"]
    doubts = [*quota_warnings(rule), *degenerate_warnings(rule["weights"], outcome.correlations)]
    for source in sources:
        doubts += filter(None, [outdated(source), decoded_bytes_warning(source, config.normalise)])
    for warning in doubts:
        tell(f"warning: {warning}")
    for source, manifest in zip(sources, outcome.manifests):
        tell(
            f"{source.output}: {manifest.parameters['num_kept']} samples, fingerprint {manifest.fingerprint}",
            on="stdout",
        )
    for source, prefix in zip(sources, config.materialize):
        assert source.samples is not None  # --materialize needs --data-path
        refined = materialize(source.samples, Selection(source.output), Path(prefix))
        dataset = refined.parameters["dataset"]
        tell(f"{prefix}: {dataset['num_documents']} documents, {dataset['num_tokens']} tokens", on="stdout")
    return ExitStatus.COMPLETE


def _table(outcome: Outcome) -> str:
    rows = [("domain", "samples", "kept", "share", "tokens kept", "threshold")]
    for name, d in outcome.domains.items():
        share = f"{d.kept / d.candidates:.4f}" if d.candidates else "-"
        threshold = "-" if d.threshold is None else f"{d.threshold:.6g}"
        rows.append((name, str(d.candidates), str(d.kept), share, str(d.kept_tokens), threshold))
    lines = columns(rows)
    survey = outcome.survey
    known = [f"{name} {value:.3f}" for name, value in outcome.correlations.items()]
    lines.append(
        f"{survey.negative} of {survey.candidates} scores are negative; {survey.excluded} samples excluded, "
        f"{survey.empty} without anything to score; correlation of the score with the NLL of {', '.join(known)}"
    )
    return "\n".join(lines)
