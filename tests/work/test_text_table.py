"""Tables as text: widths, sides, and what a cell may hold."""

from __future__ import annotations

from megakd.work.text_table import columns, markdown


def test_columns() -> None:
    assert columns([("name", "n"), ("a", "12")]) == ["name   n", "a     12"]
    assert columns([("", "n"), ("a", "12")], widths=(3, 4), gap="") == ["      n", "a    12"]
    assert columns([("longer", "1")], widths=(3, 2), gap="") == ["longer 1"]


def test_markdown() -> None:
    assert markdown(["run", "loss"], [["a|b", "-1.5"], ["c", "x"]]) == [
        "| run  | loss |",
        "|------|------|",
        r"| a\|b | -1.5 |",
        "| c    | x    |",
    ]
    assert markdown(["run", "loss"], [["a|b", "1"]], aligned=False) == ["| run | loss |", "|---|---|", r"| a\|b | 1 |"]
    assert markdown(["1", ""], [["22", ""]]) == ["| 1   |     |", "|-----|-----|", "|  22 |     |"]
