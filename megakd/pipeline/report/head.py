"""The head of a report: a score explained in two sentences, the facts, and the warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megakd.data.scores.sources import decoded_bytes_warning, outdated
from megakd.pipeline.report.config import ReportConfig
from megakd.pipeline.report.figures import Figures
from megakd.pipeline.report.scoring import REFERENCE, SCORE, TEACHER, Scoring
from megakd.pipeline.select.config import RANKS_ARE_BINNED
from megakd.pipeline.select.preflight import degenerate_warnings, quota_warnings

_USUAL: dict[str, Any] = {"gumbel_temperature": 0.0, "drop_top_fraction": 0.0}
_APART = ("domains", "datasets", "weights", "ratio", "ratio_of", "normalise", "seed", "excluded_ids", "allocation")


@dataclass(frozen=True)
class Head:
    """Texts of the head. sentences: an explanation of scores. facts: name -> value. warnings: one text each."""

    sentences: str
    facts: dict[str, str]
    warnings: list[str]


def describe(config: ReportConfig, scoring: Scoring, figures: Figures) -> Head:
    """Write the head of the page, whose facts and warnings the command prints too."""
    parameters = scoring.source.any_scores.manifest.parameters
    samples, kept = figures.num_candidates, figures.num_kept
    kept_by = f"the selection {config.selection}"
    if scoring.selection is None:
        kept_by = f"those with the largest scores, {scoring.ratio:g} of them: no selection is given"
    scale = "" if scoring.teacher_scale == 1 else f"{scoring.teacher_scale:g} x "
    facts = {
        "dataset": f"{config.data_path or ''} {scoring.source.dataset}".strip(),
        "teacher's scores": config.teacher_scores,
        "reference's scores": config.reference_scores,
        "score": f"NLL of the reference - {scale}NLL of the teacher, per {scoring.normalise}",
        "samples": f"{samples:,} with a score, of {scoring.source.num_samples:,}; {figures.num_tokens:,} scored tokens",
        "packing": f"{parameters['packing']}, at most {parameters['seq_length']} labels a sample",
        "labels": _labels(parameters),
        "kept": f"{kept:,} samples ({kept / samples:.2%}), {int(figures.scores.kept_tokens.sum()):,} tokens: {kept_by}",
    }
    if scoring.selection is not None:
        rule = scoring.selection.manifest.parameters["rule"]
        facts["selected by"] = _in_words(rule)
        if rule.get("rank_difference"):
            facts["ranks"] = RANKS_ARE_BINNED
    if figures.decisions is not None:
        agreeing = int(figures.decisions.trace())
        facts["agreement"] = (
            f"{agreeing / samples:.4f} with {config.other_teacher_scores or config.teacher_scores} and "
            f"{config.other_reference_scores or config.reference_scores}, each keeping {scoring.ratio:g}"
        )
    return Head(_sentences(scoring), facts, _warnings(scoring, figures))


def _sentences(scoring: Scoring) -> str:
    less = "the teacher's" if scoring.teacher_scale == 1 else f"{scoring.teacher_scale:g} times the teacher's"
    per = {"token": "nats a token", "byte": "nats a byte", "sample": "nats a sample"}[scoring.normalise]
    rest = "."
    if scoring.teacher_scale == 1:
        rest = "; near 0 or below it the text is as easy, or as hard, for both, as boilerplate and noise are."
    return (
        f"The score of a sample is how badly the small reference model predicts its text less how badly the teacher "
        f"does: its negative log-likelihood (NLL) under the reference minus {less}, in {per}. A large score marks text "
        f"that the larger model has learnt and the small one has not{rest}"
    )


def _labels(parameters: Mapping[str, Any]) -> str:
    policy = parameters.get("mask_policy", "all")
    if policy == "all":
        return "all are scored"
    alone = ", and each document is seen by itself" if policy == "reset" else ""
    return f"all are scored but the first tokens of documents{alone} (mask policy {policy})"


def _in_words(rule: Mapping[str, Any]) -> str:
    """The main settings of a selection, and those that are not at their defaults."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in rule["weights"].items())
    said = [
        f"ratio {rule['ratio']:g} of the {rule['ratio_of']}",
        f"over all domains ({rule['allocation']})" if rule["allocation"] == "global" else f"by {rule['allocation']}",
        f"weights of the NLLs: {weights}, per {rule['normalise']}",
    ]
    for name, value in rule.items():
        if name in _APART or value in (None, [], False) or value == _USUAL.get(name):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        said.append(name.replace("_", " ") + ("" if value is True else f" {shown}"))
    if rule.get("excluded_ids"):
        said.append("without the excluded ids")
    return "; ".join([*said, f"seed {rule['seed']}"])


def _warnings(scoring: Scoring, figures: Figures) -> list[str]:
    """The warnings of ``select``, from the selection's record and from the figures of this report."""
    rule = None if scoring.selection is None else scoring.selection.manifest.parameters["rule"]
    texts = [] if rule is None else list(quota_warnings(rule))
    if rule is None or not rule["rank_difference"]:  # a score of ranks is not correlated with NLLs here
        pearson = {(first, second): value for first, second, value, _ in figures.correlations}
        by_model = {name: pearson[column, SCORE] for name, column in (("teacher", TEACHER), ("reference", REFERENCE))}
        texts += degenerate_warnings({"reference": 1.0, "teacher": -scoring.teacher_scale}, by_model)
    return [*texts, *filter(None, [outdated(scoring.source), decoded_bytes_warning(scoring.source, scoring.normalise)])]
