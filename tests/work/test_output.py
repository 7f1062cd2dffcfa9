"""Standard output that is full, closed or given any bytes to print: a line on stderr and a status, no traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megakd.__main__ import VERBS, main, run
from megakd.errors import ExitStatus
from megakd.pipeline.datasets import show


def printing(lines: int, then: Exception | None = None) -> Callable[[Sequence[str] | None], int]:
    def work(argv: Sequence[str] | None) -> int:
        print("x" * 100 + "\n" * lines)
        if then is not None:
            raise then
        return 0

    return work


@pytest.mark.parametrize("buffering", [-1, 1])
@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (printing(1), ExitStatus.NO_SPACE, "error: standard output: No space left on device"),
        (printing(99999), ExitStatus.NO_SPACE, "error: standard output: No space left on device"),
        (lambda argv: main([]), ExitStatus.NO_SPACE, "error: standard output: No space left on device"),
        (lambda argv: main(["--version"]), ExitStatus.NO_SPACE, "error: standard output: No space left on device"),
        (show.main, ExitStatus.USAGE, "error: nowhere.bin: no such file"),
    ],
)
def test_a_full_output(
    work: Any, status: int, said: str, buffering: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(work, ["nowhere"]) == status
        full.flush()  # nothing is left that would fail once more as the interpreter ends
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(said)


def test_help_to_a_full_output(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main(["show", "--help"])
    assert stop.value.code == ExitStatus.NO_SPACE and "standard output" in capsys.readouterr().err


def test_no_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0 and "show" in VERBS


def test_names_of_any_bytes_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
    assert run(lambda argv: print("a\udcff\ud800") or 0, []) == 0  # of a file's name, and of a broken escape
    assert out.getvalue() == b"a\\udcff\\ud800\n"
