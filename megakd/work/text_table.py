"""Tables as text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, widths: Sequence[int] | None = None, gap: str = "  ") -> list[str]:
    """A line for each row: the first column to the left, the others to the right.

    widths: the least width of each column (default: that of its longest cell). gap: what stands between columns.
    """
    least = [0] * len(rows[0]) if widths is None else widths
    wide = [max(width, *(len(row[column]) for row in rows)) for column, width in enumerate(least)]
    return [
        gap.join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, wide))
        )
        for row in rows
    ]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, aligned: bool = True) -> list[str]:
    """Lines of a Markdown table; a bar inside a cell is escaped.

    aligned: pad the cells, numbers to the right, so that it reads as well on a terminal.
    """
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (headings, *rows)]
    if not aligned:
        return [
            f"| {' | '.join(lines[0])} |",
            "|---" * len(headings) + "|",
            *(f"| {' | '.join(row)} |" for row in lines[1:]),
        ]
    widths = [max(3, *(len(row[column]) for row in lines)) for column in range(len(headings))]
    padded = [
        [
            cell.rjust(width) if number and cell.lstrip("-")[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths)
        ]
        for number, row in enumerate(lines)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    first, *others = (f"| {' | '.join(row)} |" for row in padded)
    return [first, rule, *others]
