"""preprocess under kills, signals, dying workers and a second run: the same bytes in the end, and never half a file."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from marks import slow

from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import ExitStatus

COMMAND = [sys.executable, "-m", "megakd", "preprocess", "--workers", "2", "--append-eod"]
BYTES = ("--tokenizer-type", "ByteTokenizer")


def start(corpus: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--input", str(corpus), "--output-prefix", str(out), *(flags or BYTES)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for(condition: object, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def files(prefix: Path) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(prefix.name + "_*")}


def write_corpus(path: Path, documents: int) -> Path:
    rng = random.Random(0)
    with open(path, "w") as stream:
        for i in range(documents):
            stream.write(json.dumps({"text": f"{i} " + "word " * rng.randrange(60)}) + "\n")
    return path


def kill_and_rerun(tmp_path: Path, kills: int) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 1000)
    flags = (*BYTES, "--shard-bytes", "8000")
    whole, out = tmp_path / "whole" / "o", tmp_path / "killed" / "o"  # one name, as the manifest tells it
    whole.parent.mkdir()
    out.parent.mkdir()
    started = time.monotonic()
    assert finish(start(corpus, whole, *flags))[0] == 0
    seconds = time.monotonic() - started
    rng = random.Random(1)
    done, continued = 0, 0
    killed = 0
    # on a machine that is slower now than in the first run kills come too early: then later ones, until one leaves work
    while killed < kills or (not (continued or done) and killed < kills + 10):
        process = start(corpus, out, *flags)
        time.sleep(rng.uniform(0.2, 1.0) * seconds * max(1, killed - kills + 2))
        killed += 1
        process.send_signal(signal.SIGKILL)
        status, errors = finish(process)
        continued += "continuing" in errors
        done += status == 0
        # Whatever has its final name is whole.
        if Path(f"{out}_text_document.manifest.json").exists():
            assert IndexedDataset(f"{out}_text_document").num_documents == 1000
            if killed % 2:  # a finished dataset is not made again
                for path in out.parent.glob(f"{out.name}_*"):
                    path.unlink()
    assert finish(start(corpus, out, *flags))[0] == 0
    assert files(out) == files(whole)
    assert continued or done, "no kill came late enough to leave anything: the test shows nothing"
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(path.name for path in whole.parent.iterdir())


@pytest.mark.slow
def test_bytes_after_a_few_kills(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 4)


@pytest.mark.long
def test_bytes_after_fifty_kills(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 50)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_finished_shard_is_done_again(compressed: bool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 300)
    corpus.write_text(corpus.read_text() + "bad\n")
    if compressed:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
        corpus = tmp_path / "a.jsonl.gz"
    flags = (*BYTES, "--shard-bytes", "3000")
    assert finish(start(corpus, tmp_path / "o", *flags, "--strict"))[0] == ExitStatus.DATA_BUDGET
    shards = sorted((tmp_path / "o.work").glob("*/*.0.bin"))
    assert len(shards) > 4
    for shard, content in ((shards[1], b"\x01" * shards[1].stat().st_size), (shards[2], b"")):
        shard.write_bytes(content)
    shards[3].unlink()
    assert finish(start(corpus, tmp_path / "o", *flags, "--max-bad-fraction", "0.1"))[0] == 0
    assert finish(start(corpus, tmp_path / "p", *flags, "--max-bad-fraction", "0.1"))[0] == 0
    assert files(tmp_path / "o")["_text_document.bin"] == files(tmp_path / "p")["_text_document.bin"]


@pytest.mark.slow
def test_inputs_that_changed_since_the_unfinished_run_start_afresh(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 300)
    corpus.write_text(corpus.read_text() + "bad\n")
    assert finish(start(corpus, tmp_path / "o", *BYTES, "--strict"))[0] == ExitStatus.DATA_BUDGET
    corpus.write_text(corpus.read_text().replace("word", "WORD").replace("bad\n", ""))
    status, errors = finish(start(corpus, tmp_path / "o", *BYTES, "--strict"))
    assert status == 0 and "starting afresh" in errors
    assert finish(start(corpus, tmp_path / "p", *BYTES))[0] == 0
    assert files(tmp_path / "o")["_text_document.bin"] == files(tmp_path / "p")["_text_document.bin"]


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run in the middle of its work, on an input large enough to be there for seconds."""
    corpus = write_corpus(tmp_path / "a.jsonl", 15_000)
    process = start(corpus, tmp_path / "o", *BYTES, "--shard-bytes", "20000")
    wait_for(lambda: any((tmp_path / "o.work").glob("*/*.json")))
    yield process, corpus
    for child in [*children(process.pid), process.pid]:
        if alive(child):
            os.kill(child, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_keeps_what_is_done(number: int, busy: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    process, corpus = busy
    workers = children(process.pid)
    assert workers
    process.send_signal(number)
    status, errors = finish(process)
    assert status == ExitStatus.STOPPED and "continues" in errors
    assert not files(tmp_path / "o") and not any(map(alive, workers))
    assert list((tmp_path / "o.work").glob("*/*.json")) and not (tmp_path / "o.lock").exists()
    status, errors = finish(start(corpus, tmp_path / "o", *BYTES, "--shard-bytes", "20000"))
    assert status == 0 and "continuing" in errors


@pytest.mark.slow
def test_a_killed_worker_is_replaced(busy: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    process, corpus = busy
    os.kill(children(process.pid)[0], signal.SIGKILL)
    status, errors = finish(process)
    assert status == 0 and "died (SIGKILL); its work is done again" in errors
    assert finish(start(corpus, tmp_path / "p", *BYTES))[0] == 0
    assert files(tmp_path / "o")["_text_document.bin"] == files(tmp_path / "p")["_text_document.bin"]


def test_workers_that_keep_dying_end_the_run(busy: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    process, _ = busy
    while process.poll() is None:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.01)
    status, errors = finish(process)
    assert status == ExitStatus.FAILED and "as did the one before it" in errors
    assert not files(tmp_path / "o")


def test_workers_die_with_their_parent(busy: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = busy
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, workers)), seconds=100)


@pytest.mark.slow
def test_a_second_run_on_the_same_output_is_refused(busy: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    process, corpus = busy
    status, errors = finish(start(corpus, tmp_path / "o", *BYTES))
    assert status == ExitStatus.USAGE
    assert f'"pid": {process.pid}' in errors and '"host"' in errors and '"started"' in errors
    process.kill()
    process.wait()
    assert (tmp_path / "o.lock").exists()  # stale, and taken over
    assert finish(start(corpus, tmp_path / "o", *BYTES, "--shard-bytes", "20000"))[0] == 0


@pytest.mark.slow
def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 3000)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash"]  # 64 KiB a file
    command = [*COMMAND, "--input", str(corpus), "--output-prefix", str(tmp_path / "o"), *BYTES]
    done = subprocess.run([*limited, *command], stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == ExitStatus.NO_SPACE, done.stderr
    assert not files(tmp_path / "o")
    assert finish(start(corpus, tmp_path / "o"))[0] == 0
