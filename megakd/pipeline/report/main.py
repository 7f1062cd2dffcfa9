"""``megakd report``: distributions of scores and the part that a selection keeps, as a page, tables and plots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from megakd.artefacts.durable_files import atomic_write
from megakd.artefacts.manifest import as_json
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import parse, to_dict
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import ExitStatus, MismatchError
from megakd.pipeline.report.config import ReportConfig
from megakd.pipeline.report.figures import count
from megakd.pipeline.report.head import Head, describe
from megakd.pipeline.report.page import render
from megakd.pipeline.report.plots import draw
from megakd.pipeline.report.sample_text import decode, diversity, visible
from megakd.pipeline.report.scoring import Scoring, open_scoring
from megakd.pipeline.report.tables import Table, build_tables

HELP = "show scores and what a selection keeps of them: a page, tables, plots"
FORMAT, VERSION = "megakd-report", 1
TABLES = (
    "scores", "cumulative", "nll", "domains", "lengths", "correlations", "agreement", "diversity", "extremes",
)  # fmt: skip
_DECIDING = ("ratio", "teacher_scale", "normalise", "domains", "exclude_ids")
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
    if samples is not None and config.extremes:  # a missing tokenizer is found before the long part
        tokenizer = open_tokenizer(
            samples.dataset,
            tokenizer_type=config.tokenizer_type,
            tokenizer_model=config.tokenizer_model,
            vocab_size=config.vocab_size,
        )
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder / "report.lock"):
        _refuse_other(folder, config, scoring)
        num_drawn = 0 if samples is None else config.diversity_samples
        figures = count(scoring, bins=config.bins, num_extremes=config.extremes, num_drawn=num_drawn)
        ngrams = diversity(samples, figures.drawn) if samples is not None and num_drawn else []
        tables = build_tables(scoring, figures, ngrams)
        texts = {}
        if samples is not None and tokenizer is not None:
            ids = sorted({sample for several in figures.extremes.values() for sample in several.tolist()})
            texts = {sample: decode(samples, sample, tokenizer, chars=config.extreme_chars) for sample in ids}
        head = describe(config, scoring, figures)
        plots = draw(figures, tables, scoring.normalise)
        page = render(head, tables, plots, texts)
        write(folder, config, scoring, head, tables, plots, page)
    for name, value in head.facts.items():
        print(visible(f"{name}: {value}"))
    for warning in head.warnings:
        print(visible(f"warning: {warning}"), file=sys.stderr)
    print(f"{folder / 'report.html'}: {len(page)} bytes")
    return ExitStatus.COMPLETE


def write(
    folder: Path,
    config: ReportConfig,
    scoring: Scoring,
    head: Head,
    tables: dict[str, Table],
    plots: dict[str, bytes],
    page: bytes,
) -> None:
    """Write all files. ``report.json`` is removed first and written last, so that it stands for a whole report."""
    (folder / "report.json").unlink(missing_ok=True)
    for name in TABLES:
        for suffix, content in ((".csv", tables[name].csv() if name in tables else None), (".png", plots.get(name))):
            if content is None:
                (folder / f"{name}{suffix}").unlink(missing_ok=True)  # an earlier report's
            else:
                atomic_write(folder / f"{name}{suffix}", content)
    atomic_write(folder / "report.html", page)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_dict(config),
        "parents": _parents(scoring),
        "facts": head.facts,
        "warnings": head.warnings,
    }
    atomic_write(
        folder / "report.json", orjson.dumps(as_json(record), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )


def _parents(scoring: Scoring) -> dict[str, str]:
    parents = {f"scores {name}": scores.fingerprint for name, scores in scoring.source.scores.items()}
    if scoring.selection is not None:
        parents["selection"] = scoring.selection.fingerprint
    return {"dataset": scoring.source.dataset, **parents}


def _refuse_other(folder: Path, config: ReportConfig, scoring: Scoring) -> None:
    """Raise MismatchError for a folder with the report of other scores, or of a score with other settings.

    Settings of the display, such as bins and extremes, may change.
    """
    try:
        record = orjson.loads((folder / "report.json").read_bytes())
        recorded = {**record["parents"], **{name: record["config"].get(name) for name in _DECIDING}}
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
        return  # no report, or an unfinished one
    expected = {**_parents(scoring), **{name: getattr(config, name) for name in _DECIDING}}
    wrong = [
        f"{key}: {recorded.get(key)} there, {expected.get(key)} here"
        for key in dict.fromkeys([*recorded, *expected])
        if recorded.get(key) != expected.get(key)
    ]
    if wrong:
        raise MismatchError(
            f"{folder} holds another report than this: {'; '.join(wrong)}. Give another --output, or remove the folder"
        )
