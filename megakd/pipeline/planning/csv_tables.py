"""Tables of runs that users give to ``megakd plan``, as CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from megakd.errors import UsageError


def open_table(flag: str, path: Path) -> csv.DictReader[str]:
    """Open a CSV file whose first line names the columns. Raises UsageError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: {error}; expected a CSV file") from None
    return csv.DictReader(text.splitlines(), skipinitialspace=True)


def positive(flag: str, path: Path, table: csv.DictReader[str], column: str, text: str | None) -> float:
    """Read a number above 0 in the line that ``table`` is at. Raises UsageError for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{flag} {path}: line {table.line_num}: {column} is {text!r}; expected a positive number")
    return value
