"""The lock of a run: one at a time, told who holds it, and nothing pretended where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from megakd.__main__ import run
from megakd.artefacts.run_lock import HeldError, RunLock
from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import ExitStatus, NoSpaceError, UsageError
from megakd.pipeline.datasets import merge
from megakd.pipeline.preprocess import main as preprocess


def test_one_at_a_time(tmp_path: Path) -> None:
    told = f'another run is writing this output: .*"pid": {os.getpid()}'
    with RunLock(tmp_path / "lock"), pytest.raises(HeldError, match=told):
        RunLock(tmp_path / "lock").__enter__()
    assert not (tmp_path / "lock").exists()
    with RunLock(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_no_locks_are_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="this file system has no locks") as caught:
        RunLock(tmp_path / "lock").__enter__()
    assert not isinstance(caught.value, HeldError)  # who waits for the holder would wait for ever


def test_a_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(NoSpaceError):
            RunLock(tmp_path / "lock").__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "lock").exists()


def test_the_folder_of_an_output_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README's commands work in an empty folder, whichever verb writes first."""
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    flags = ["--input", str(tmp_path / "text.jsonl"), "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    prefix = tmp_path / "data" / "new" / "train"
    assert run(preprocess.main, [*flags, "--output-prefix", str(prefix)]) == ExitStatus.COMPLETE
    made, joined = f"{prefix}_text_document", tmp_path / "joined" / "all"
    assert run(merge.main, ["--input-prefix", made, made, "--output-prefix", str(joined)]) == ExitStatus.COMPLETE
    assert IndexedDataset(joined).num_documents == 4
    for verb in ([*flags], ["--input-prefix", made, made]):
        main = preprocess.main if verb == flags else merge.main
        assert run(main, [*verb, "--output-prefix", str(tmp_path / "text.jsonl" / "x")]) == ExitStatus.USAGE
        assert "a file is in its place" in capsys.readouterr().err
