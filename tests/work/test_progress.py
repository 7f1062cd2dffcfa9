"""Progress: the lines that are printed, and when."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megakd.work import progress as progress_module
from megakd.work.progress import ByteProgress, DocumentProgress, Progress, RangeProgress, RequestProgress, clock

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    return pass_seconds


def test_a_line_every_few_seconds_also_where_nothing_is_done(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    progress = DocumentProgress(1_000_000, done_bytes=0, log_interval=10_000)
    for _ in range(60):  # a minute of bad records alone
        wait(1)
        progress.add(num_bytes=10_000, documents=0, tokens=0, bad=7)
        progress.tick()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert re.fullmatch(r"Processed 0 documents, 35 bad \(0 docs/s, 0\.0 MB/s, 0 tokens/s, 5 %, 95 s left\)", lines[0])


def test_a_line_a_second_where_many_documents_are_done(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    progress = DocumentProgress(1000, done_bytes=500, log_interval=10)
    for _ in range(8):
        wait(0.5)
        progress.add(num_bytes=50, documents=10, tokens=20, bad=0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "Processed 20 documents, 0 bad (20 docs/s, 0.0 MB/s, 40 tokens/s, 60 %, 4 s left)"
    assert progress.summary() == "4.0 s, 20 docs/s, 0.0 MB/s, 40 tokens/s"


def test_ranges_count_what_others_commit(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    done = iter([5, 20, 100])
    progress = RangeProgress(100, seq_length=16, samples_done=lambda: next(done), interval=2.0)
    wait(1)
    progress.tick(3)  # not due yet: nothing is counted
    wait(3)
    progress.tick(5)
    wait(4)
    progress.tick(5)
    assert capsys.readouterr().err.splitlines() == [
        "continuing: 5 of 100 samples are scored",
        "scored 25 of 100 samples (25.0 %, 80 tokens/s, 0:00:15 left)",
        "scored 100 of 100 samples (100.0 %, 190 tokens/s, 0:00:00 left)",
    ]


def test_no_rate_before_anything_is_done(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    progress = RangeProgress(100, seq_length=16, samples_done=lambda: 5, interval=0.0, done="captured")
    wait(1)
    progress.tick(0)
    assert capsys.readouterr().err.splitlines()[1] == "captured 5 of 100 samples (5.0 %)"
    assert Progress(3, done=1, interval=0.0).seconds_left is None


@pytest.mark.parametrize(("seconds", "text"), [(14.6, "0:00:15"), (3661.0, "1:01:01"), (None, "-")])
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_bytes_of_files_in_a_log(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress(100_000_000, what="merge") as progress:
        for _ in range(10):
            wait(1)
            progress.update(5_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "merge: 25 % of 100000000 bytes, 5.0 MB/s, 0:00:15 left" and len(lines) == 2


def test_requests_are_weighed_by_their_tokens(wait: Wait, capsys: pytest.CaptureFixture[str]) -> None:
    """Two copies of a model; the longest requests come first, so their number alone would promise too much time."""
    progress = RequestProgress(100, 10_000, interval=5, what="requests", says=True, copies=2)
    wait(10)
    progress.add(count=5, tokens=2500)
    assert capsys.readouterr().err == "requests: 10 of 100 (50.0 % of the tokens, 500 tokens/s, 0:00:10 left)\n"
    wait(1)
    progress.add(count=1, tokens=10)
    wait(9)
    progress.add(count=44, tokens=2490)
    assert capsys.readouterr().err == "requests: 100 of 100 (100.0 % of the tokens, 500 tokens/s, 0:00:00 left)\n"
    silent = RequestProgress(1, 1, interval=0, what="requests", says=False)
    silent.add(count=1, tokens=1)
    assert not capsys.readouterr().err
