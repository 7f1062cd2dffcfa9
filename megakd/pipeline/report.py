"""``megakd report``: what scores look like and what a selection keeps of them, as a page, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megakd.config import parse, to_dict
from megakd.data.recorded import open_tokenizer
from megakd.durable import atomic_write
from megakd.errors import ExitStatus
from megakd.pipeline.lock import RunLock
from megakd.pipeline.report_config import ReportConfig
from megakd.pipeline.report_figures import Figures, count
from megakd.pipeline.report_page import render
from megakd.pipeline.report_plots import draw
from megakd.pipeline.report_scoring import Scoring, open_scoring
from megakd.pipeline.report_tables import Table, build_tables
from megakd.pipeline.report_text import decode, diversity, visible

HELP = "show scores and what a selection keeps of them: a page, tables, plots"
FORMAT, VERSION = "megakd-report", 1
TABLES = (
    "scores", "cumulative", "nll", "domains", "lengths", "correlations", "agreement", "diversity", "extremes",
)  # fmt: skip
_DESCRIPTION = (
    "Look at the scores of a dataset and at what is kept of it: distributions, teacher against reference, kept shares "
    "by domain and length, agreement with a second scoring, the samples at either end, distinct n-grams. Writes CSV "
    "tables, PNG plots and one HTML page that needs nothing else."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(ReportConfig, argv, prog="megakd report", description=_DESCRIPTION)
    scoring = open_scoring(config)
    samples = scoring.source.samples
    tokenizer = None
    if samples is not None and config.extremes:  # now: one that is not there is found before the long part
        tokenizer = open_tokenizer(
            samples.dataset,
            tokenizer_type=config.tokenizer_type,
            tokenizer_model=config.tokenizer_model,
            vocab_size=config.vocab_size,
        )
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder / "report.lock"):
        num_drawn = 0 if samples is None else config.diversity_samples
        figures = count(scoring, bins=config.bins, num_extremes=config.extremes, num_drawn=num_drawn)
        ngrams = diversity(samples, figures.drawn) if samples is not None and num_drawn else []
        tables = build_tables(scoring, figures, ngrams)
        texts = {}
        if samples is not None and tokenizer is not None:
            ids = sorted({sample for several in figures.extremes.values() for sample in several.tolist()})
            texts = {sample: decode(samples, sample, tokenizer, chars=config.extreme_chars) for sample in ids}
        facts = describe(config, scoring, figures)
        plots = draw(figures, tables)
        page = render(facts, tables, plots, texts)
        write(folder, config, scoring, facts, tables, plots, page)
    for name, value in facts.items():
        print(visible(f"{name}: {value}"))
    print(f"{folder / 'report.html'}: {len(page)} bytes")
    return ExitStatus.COMPLETE


def describe(config: ReportConfig, scoring: Scoring, figures: Figures) -> dict[str, Any]:
    """What stands at the head of the page."""
    scores = scoring.source.any_scores
    kept = config.selection or f"the {scoring.ratio:g} of the samples with the largest scores"
    facts = {
        "dataset": f"{config.data_path or ''} {scoring.source.dataset}".strip(),
        "teacher's scores": config.teacher_scores,
        "reference's scores": config.reference_scores,
        "kept": kept,
        "score": f"NLL of the reference - {scoring.teacher_scale:g} x NLL of the teacher, per {scoring.normalise}",
        "packing": f"{scores.manifest.parameters['packing']}, {scores.manifest.parameters['seq_length']} tokens",
        "samples": f"{figures.num_candidates} with a score, of {scoring.source.num_samples}",
        "tokens": figures.num_tokens,
        "samples kept": f"{figures.num_kept} ({figures.num_kept / figures.num_candidates:.4f})",
    }
    if scoring.selection is not None:
        rule = dict(scoring.selection.manifest.parameters["rule"])
        shown = {key: value for key, value in rule.items() if key not in ("domains", "datasets")}
        facts["selected by"] = orjson.dumps(shown).decode()
    if figures.decisions is not None:
        agreeing = int(figures.decisions.trace())
        facts["agreement"] = (
            f"{agreeing / figures.num_candidates:.4f} with "
            f"{config.other_teacher_scores or config.teacher_scores} and "
            f"{config.other_reference_scores or config.reference_scores}, each keeping {scoring.ratio:g}"
        )
    return facts


def write(
    folder: Path,
    config: ReportConfig,
    scoring: Scoring,
    facts: dict[str, Any],
    tables: dict[str, Table],
    plots: dict[str, bytes],
    page: bytes,
) -> None:
    """All files; ``report.json`` goes first and comes back last, so that it stands for a whole report."""
    (folder / "report.json").unlink(missing_ok=True)
    for name in TABLES:
        for suffix, content in ((".csv", tables[name].csv() if name in tables else None), (".png", plots.get(name))):
            if content is None:
                (folder / f"{name}{suffix}").unlink(missing_ok=True)  # an earlier report's
            else:
                atomic_write(folder / f"{name}{suffix}", content)
    atomic_write(folder / "report.html", page)
    parents = {f"scores {name}": scores.fingerprint for name, scores in scoring.source.scores.items()}
    if scoring.selection is not None:
        parents["selection"] = scoring.selection.fingerprint
    record = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(config),
        "parents": {"dataset": scoring.source.dataset, **parents},
        "facts": facts,
    }
    atomic_write(folder / "report.json", orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
