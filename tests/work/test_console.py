"""Lines that long work prints by the way may go unread: the work goes on, and ends as if they had been read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest
import yaml
from runs import losses, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.work.console import tell


def unread() -> TextIO:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("on", ["stdout", "stderr"])
def test_nobody_reads(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = unread()
    monkeypatch.setattr(sys, on, stream)
    tell("one", on=on)  # type: ignore[arg-type]
    tell("two", on=on)  # type: ignore[arg-type]
    stream.close()  # what was not written is not tried again


def test_a_full_disk_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        tell("one", on="stdout")
        tell("two", on="stdout")
    assert capsys.readouterr().err == (
        "standard output cannot be written: No space left on device; the work goes on without it\n"
    )


def test_streams_that_were_closed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    tell("one", on="stdout")


def unread_run(tree: dict[str, dict[str, object]]) -> int:
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = unread(), unread()
    try:
        return run_training(tree)
    finally:
        sys.stdout, sys.stderr = kept


def test_a_run_that_nobody_reads_goes_on(world: Worlds, tmp_path: Path) -> None:
    tree = make_tree(
        write_dataset(tmp_path / "data"),
        training={"train_iters": 3},
        logging={"log_interval": 1},
        checkpoint={"save": str(tmp_path / "run")},
    )
    assert world(1).run(unread_run, tree) == [0]
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3\n"


def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    program = (
        "import os, sys; from megakd.work.console import keep_stream_numbers; keep_stream_numbers(); "
        "sys.exit(os.open('/dev/null', os.O_RDONLY) - 3)"
    )
    command = f'exec {sys.executable} -c "{program}" 0<&- 1>&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=200).returncode == 0


@pytest.mark.long
def test_train_into_head(tmp_path: Path) -> None:
    """A shell's pipe into ``head``: status 0, and nothing on stderr about a pipe."""
    tree = make_tree(
        write_dataset(tmp_path / "data"),
        training={"train_iters": 30},
        logging={"log_interval": 1},
        checkpoint={"save": str(tmp_path / "run")},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = f"{sys.executable} -m megakd train --config run.yaml | head -3; echo status ${{PIPESTATUS[0]}}"
    shown = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert len(shown.stdout.splitlines()) == 4 and shown.stdout.endswith("status 0\n"), shown.stderr
    assert "ipe" not in shown.stderr
    assert sorted(losses(tmp_path / "run")) == list(range(1, 31))
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "30\n"
