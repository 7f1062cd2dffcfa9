"""The lock of a run: one at a time, told who holds it, and nothing pretended where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from megakd.errors import NoSpaceError, UsageError
from megakd.pipeline.lock import HeldError, RunLock


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
