"""The page of a report: one HTML file that loads nothing else, with all text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megakd.pipeline.report.head import Head
from megakd.pipeline.report.plots import several_lengths
from megakd.pipeline.report.sample_text import visible
from megakd.pipeline.report.tables import Table

# The browser's own refusal, should anything slip through: no script, no network.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.15em .7em;text-align:right;vertical-align:top;border-bottom:1px solid #ddd}td:first-child,"
    "th:first-child,.facts td{text-align:left}.facts td{overflow-wrap:anywhere}.facts th{font-weight:normal;color:#555;"
    "white-space:nowrap}.warnings{background:#fff3d6;border-left:4px solid #e0a000;padding:.5em 1em}img{max-width:100%}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.6em;unicode-bidi:isolate}"
)
_SECTIONS = (
    ("scores", "Scores", "How often each score is. In scores.csv: every bin, the first and last with all beyond."),
    ("cumulative", "Cumulative", "What part of the samples, tokens and kept samples has this score or a larger one."),
    ("nll", "Teacher against reference", "Above the line the teacher predicts better. In nll.csv: every cell."),
    ("domains", "By domain", "With --domains counted here, else as the selection recorded them."),
    ("lengths", "By length", "What part is kept of the samples with so many tokens, in powers of two."),
    (
        "correlations",
        "Correlations",
        "1: both rank the samples alike; 0: they have nothing to do with one another. "
        "Spearman's from ranks in bins of the floats' first 20 bits.",
    ),
    ("agreement", "Agreement of two scorings", "Each keeps the same ratio of the samples, those with its largest."),
    ("diversity", "Distinct n-grams", "Inside samples drawn at random, as many of all as of the kept ones."),
    ("extremes", "Extremes", ""),
)
_ROWS_SHOWN = 60
_NOT_LISTED = ("scores", "cumulative", "nll")
_NO_AMOUNTS = ("place", "sample", "n", "from", "to")  # numbers that are read digit by digit


def render(
    head: Head,
    tables: Mapping[str, Table],
    plots: Mapping[str, bytes],
    texts: Mapping[int, str],
) -> bytes:
    """Build the page, as UTF-8.

    texts: sample id -> decoded text, which is not trusted.
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>Scores and selection</title><style>{_STYLE}</style></head><body>",
        "<h1>Scores and selection</h1>",
        f"<p>{_text(head.sentences)}</p>",
        *_warnings(head.warnings),
        '<table class="facts">'
        + "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in head.facts.items())
        + "</table>",
    ]
    shown = _shown(tables)
    for name, title, note in _SECTIONS:
        if name not in shown:
            continue
        lines.append(f"<h2>{_text(title)}</h2>" + (f"<p>{_text(note)}</p>" if note else ""))
        if name in plots:
            data = base64.b64encode(plots[name]).decode()
            lines.append(f'<p><img alt="{_text(title)}" src="data:image/png;base64,{data}"></p>')
        if name not in _NOT_LISTED:
            lines.append(_table(shown[name]))
        if name == "extremes":
            lines += _texts(tables[name], texts)
    lines.append("</body></html>\n")
    return "\n".join(lines).encode()


def _shown(tables: Mapping[str, Table]) -> dict[str, Table]:
    """The tables without those that have nothing to compare: a single domain, lengths that are all in one class."""
    shown = dict(tables)
    if len(tables["domains"].rows) < 2:
        del shown["domains"]
    lengths = [row for rows in several_lengths(tables["lengths"]).values() for row in rows]
    shown["lengths"] = replace(tables["lengths"], rows=lengths)
    if not lengths:
        del shown["lengths"]
    return shown


def _warnings(texts: Sequence[str]) -> list[str]:
    return ['<div class="warnings">', *(f"<p>Warning: {_text(text)}</p>" for text in texts), "</div>"] if texts else []


def _table(table: Table) -> str:
    amounts = [word not in _NO_AMOUNTS for word in table.header]
    rows = [
        [f"{value:,}" if amount and isinstance(value, int) else value for amount, value in zip(amounts, row)]
        for row in table.rows[:_ROWS_SHOWN]
    ]
    shown = _rows([word.replace("_", " ") for word in table.header], rows)
    more = len(table.rows) - _ROWS_SHOWN
    return shown + (f"<p>{more} more rows in {table.name}.csv</p>" if more > 0 else "")


def _texts(table: Table, texts: Mapping[int, str]) -> list[str]:
    return [
        f"<h3>{_text(row[0])}, place {row[1]}: sample {row[2]}, score {_text(row[3])}</h3>"
        f"<pre>{_text(texts[row[2]])}</pre>"
        for row in table.rows
        if row[2] in texts
    ]


def _rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(word)}</th>" for word in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.5g}"
    return html.escape(visible(str(value)))
