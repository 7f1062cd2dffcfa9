"""The page of a report: one HTML file that reads nothing else, and in which text is only ever text."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from megakd.pipeline.report_tables import Table
from megakd.pipeline.report_text import visible

# The browser's own refusal, should anything slip through: no script, no network.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:"
    "left}img{max-width:100%}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.6em;"
    "unicode-bidi:isolate}"
)
_SECTIONS = (
    ("scores", "Scores", "The bins at either end hold the tails, a thousandth of the samples each."),
    ("cumulative", "Cumulative", "What part of the samples, tokens and kept samples has this score or a larger one."),
    ("nll", "Teacher against reference", "Above the line the teacher is better. In nll.csv: every cell."),
    ("domains", "By domain", ""),
    ("lengths", "By length", ""),
    ("correlations", "Correlations", "Spearman's from ranks in bins of the floats' first 20 bits."),
    ("agreement", "Agreement of two scorings", "Each keeps the same ratio of the samples, those with its largest."),
    ("diversity", "Distinct n-grams", "Inside samples drawn at random, as many of all as of the kept ones."),
    ("extremes", "Extremes", ""),
)
_ROWS_SHOWN = 60
_NOT_LISTED = ("scores", "cumulative", "nll")


def render(
    facts: Mapping[str, Any],
    tables: Mapping[str, Table],
    plots: Mapping[str, bytes],
    texts: Mapping[int, str],
) -> bytes:
    """The page as UTF-8.

    facts: shown first, name and value. texts: sample id -> decoded text; whoever wrote it is not trusted.
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>Scores and selection</title><style>{_STYLE}</style></head><body>",
        "<h1>Scores and selection</h1>",
        _rows(("", ""), list(facts.items())),
    ]
    for name, title, note in _SECTIONS:
        if name not in tables:
            continue
        lines.append(f"<h2>{_text(title)}</h2>" + (f"<p>{_text(note)}</p>" if note else ""))
        if name in plots:
            data = base64.b64encode(plots[name]).decode()
            lines.append(f'<p><img alt="{_text(title)}" src="data:image/png;base64,{data}"></p>')
        if name not in _NOT_LISTED:
            lines.append(_table(tables[name]))
        if name == "extremes":
            lines += _texts(tables[name], texts)
    lines.append("</body></html>\n")
    return "\n".join(lines).encode()


def _table(table: Table) -> str:
    shown = _rows([word.replace("_", " ") for word in table.header], table.rows[:_ROWS_SHOWN])
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
