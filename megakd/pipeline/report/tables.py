"""The tables of a report, as rows and as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.pipeline.report.figures import Amounts, Figures
from megakd.pipeline.report.sample_text import Diversity
from megakd.pipeline.report.scoring import SCORE, Scoring

_AMOUNTS = ("samples", "tokens", "kept_samples", "kept_tokens", "kept_share", "kept_token_share")


@dataclass(frozen=True)
class Table:
    """Rows under a header. Numbers are Python's own, whose text is the shortest that reads back the same."""

    name: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def csv(self) -> bytes:
        """The table as CSV: UTF-8, lines ended by LF, unknown figures empty."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(["" if _unknown(value) else value for value in row] for row in self.rows)
        return stream.getvalue().encode(errors="backslashreplace")


def build_tables(scoring: Scoring, figures: Figures, ngrams: Sequence[Diversity]) -> dict[str, Table]:
    """Name -> table; those that were not asked for are left out."""
    tables = [
        _scores(figures),
        _cumulative(figures),
        _nll(figures),
        _domains(scoring, figures),
        _lengths(figures),
        Table("correlations", ("one", "other", "pearson", "spearman"), list(figures.correlations)),
    ]
    if figures.decisions is not None:
        tables.append(_agreement(scoring, figures))
    if any(len(ids) for ids in figures.extremes.values()):
        tables.append(_extremes(scoring, figures))
    if ngrams:
        header = ("samples_of", "n", "samples", "ngrams", "distinct", "distinct_share")
        rows = [(d.of, d.n, d.num_samples, d.num_ngrams, d.num_distinct, _share(d.num_distinct, d.num_ngrams))
                for d in ngrams]  # fmt: skip
        tables.append(Table("diversity", header, rows))
    return {table.name: table for table in tables}


def _scores(figures: Figures) -> Table:
    edges = figures.score_edges.tolist()
    rows = [(*ends, *amounts) for ends, amounts in zip(itertools.pairwise(edges), _amounts(figures.scores))]
    return Table("scores", ("score_from", "score_to", *_AMOUNTS), rows)


def _cumulative(figures: Figures) -> Table:
    """Shares of samples, tokens and kept samples at or above each edge of the histogram."""
    above = [np.concatenate((np.cumsum(counts[::-1])[::-1], [0])).tolist()
             for counts in (figures.scores.samples, figures.scores.tokens, figures.scores.kept)]  # fmt: skip
    totals = figures.num_candidates, figures.num_tokens, figures.num_kept
    rows = [(edge, *map(_share, amounts, totals)) for edge, *amounts in zip(figures.score_edges.tolist(), *above)]
    return Table("cumulative", ("score", "samples_share_above", "tokens_share_above", "kept_share_above"), rows)


def _nll(figures: Figures) -> Table:
    edges = figures.nll_edges.tolist()
    rows = [
        (edges[i], edges[i + 1], edges[j], edges[j + 1], int(figures.nll[i, j]), int(figures.nll_kept[i, j]))
        for i, j in np.argwhere(figures.nll).tolist()
    ]
    header = ("teacher_from", "teacher_to", "reference_from", "reference_to", "samples", "kept_samples")
    return Table("nll", header, rows)


def _domains(scoring: Scoring, figures: Figures) -> Table:
    """Domains of ``--domains``; without the flag those that the selection recorded."""
    header = ("domain", *_AMOUNTS, "mean_score")
    recorded = {} if scoring.selection is None else scoring.selection.manifest.parameters["rule"].get("domains", {})
    if len(figures.domains) == 1 and len(recorded) > 1:
        keys = ("candidates", "candidate_tokens", "kept", "kept_tokens")
        columns = [np.array([domain[key] for domain in recorded.values()], np.int64) for key in keys]
        amounts = _amounts(Amounts(*columns))
        return Table("domains", header, [(name, *row, float("nan")) for name, row in zip(recorded, amounts)])
    sums = figures.domain_score_sums.tolist()
    rows = [
        (name, *amounts, _share(total, amounts[0]))
        for name, amounts, total in zip(figures.domains, _amounts(figures.by_domain), sums)
    ]
    return Table("domains", header, rows)


def _lengths(figures: Figures) -> Table:
    rows = [
        (of, 1 << group, (2 << group) - 1, *row)
        for of, amounts in figures.by_length.items()
        for group, row in enumerate(_amounts(amounts))
        if row[0]
    ]
    return Table("lengths", ("length", "from", "to", *_AMOUNTS), rows)


def _agreement(scoring: Scoring, figures: Figures) -> Table:
    assert figures.decisions is not None
    (neither, second), (first, both) = figures.decisions.tolist()
    share = _share(neither + both, figures.num_candidates)
    header = ("ratio", "samples", "both_keep", "only_first_keeps", "only_other_keeps", "neither_keeps", "agreement")
    return Table("agreement", header, [(scoring.ratio, figures.num_candidates, both, first, second, neither, share)])


def _extremes(scoring: Scoring, figures: Figures) -> Table:
    header = ("end", "place", "sample", "score", "teacher_nll", "reference_nll", "tokens")
    rows = []
    for end, ids in figures.extremes.items():
        for place, sample in enumerate(ids.tolist(), 1):
            values = [float(value) for value in values_of(scoring, sample)]
            rows.append((end, place, sample, *values, int(scoring.source.counts[sample])))
    return Table("extremes", header, rows)


def values_of(scoring: Scoring, sample: int) -> tuple[np.float32, np.float32, np.float32]:
    """Score, NLL of the teacher and NLL of the reference of one sample, fp32."""
    divisor = scoring.source.divisor
    by = np.float32(divisor if isinstance(divisor, int) else divisor[sample])
    teacher, reference = (-scoring.source.scores[name].log_probs[sample] / by for name in ("teacher", "reference"))
    return scoring.keys[SCORE].scores(0, sample, sample + 1)[0], teacher, reference


def _amounts(amounts: Amounts) -> list[tuple[int | float, ...]]:
    columns = (amounts.samples, amounts.tokens, amounts.kept, amounts.kept_tokens)
    return [(*row, _share(row[2], row[0]), _share(row[3], row[1])) for row in zip(*(each.tolist() for each in columns))]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and value != value
