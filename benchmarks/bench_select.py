"""Selecting half of the samples by the difference of two scores, and copying what was kept.

    python benchmarks/bench_select.py [--samples 50000000] [--copied 400000] [--repeats 3] [--json PATH] [--quick]

ours: `megakd select`, three passes in numpy over the scores on disk, with the selection written and hashed. The peer
is the way of MiniPLM's scripts, in our words: load the shards of both models' scores, concatenate and cache them,
subtract, save and load the difference, sort all of it, cut, sort the ids; then fetch the kept samples one by one,
collect them in a list, concatenate, write. numpy: the same set by `argpartition` over mapped files, in memory. Each
case is a process of its own; figures are CPU seconds (user and system, all threads) after the imports, medians of
repeats that take turns; memory is the most anonymous memory above what was there after the imports. All must keep the
same number of samples, and those whose scores are the same floats in the end (ties aside) the same ids but a few; the
copies must have the same bytes. Selecting has no goal of speed: docs/decisions/0012-selection-in-numpy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megakd.config.tree import parse
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.indexed.idx_format import manifest_path, write_idx
from megakd.data.samples.concat import ConcatSamples
from megakd.data.scores.artefact import COUNTS, LOG_PROBS, finish_scores
from megakd.data.selection import MANIFEST, Selection, SelectionWriter
from megakd.pipeline.select.config import SelectConfig
from megakd.pipeline.select.materialize import materialize
from megakd.pipeline.select.preflight import open_scored
from megakd.pipeline.select.run import select

SEQ_LENGTH, SHARDS, PIECE = 1024, 25, 1 << 20
RATIO = 0.5


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000_000)
    parser.add_argument("--copied", type=int, default=400_000, help="samples of the dataset half of which is copied")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.samples, options.copied, options.repeats = 300_000, 3000, 1
    if options.case:
        run_case(options.case, options.work, options.samples)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    for row in rows:
        goal = "" if row["goal"] is None else f"  goal {row['goal']}{'' if row['met'] else ': NOT MET'}"
        print(f"{row['name']:<84} {row['value']:>9.2f} {row['unit']}{goal}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    write_scores(work, options.samples)
    write_corpus(work, options.copied)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(options.repeats):
        for name in CASES:
            command = [sys.executable, "-W", "ignore", __file__, "--case", name, "--work", str(work)]
            command += ["--samples", str(options.samples)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    results = [[case[0]["result"] for name, case in found.items() if name.startswith(kind)] for kind in ("sel", "copy")]
    assert all(result == results[0][0] for result in results[0]), results
    ours, theirs = (np.fromfile(work / name, np.int64) for name in ("out/ids.i64", "select-miniplm.ids"))
    same = len(np.intersect1d(ours, theirs, assume_unique=True))
    assert len(ours) - same <= 5, f"{len(ours) - same} ids differ"
    assert results[1][0] == results[1][1], results  # the same bytes
    cpu = {name: statistics.median(case["cpu"] for case in cases) for name, cases in found.items()}
    memory = {name: max(case["anonymous_MB"] for case in cases) for name, cases in found.items()}
    wall = {name: statistics.median(case["wall"] for case in cases) for name, cases in found.items()}
    for name in CASES:
        print(f"# {name:<24} cpu {cpu[name]:8.3f} s  wall {wall[name]:8.3f} s  anonymous {memory[name]:8.1f} MB")
    millions = f"half of {options.samples / 1e6:g} M samples"
    kept_bytes = results[1][0][0]

    def row(name: str, value: float, unit: str, goal: float | None, *, at_most: bool = False) -> dict[str, Any]:
        met = goal is None or (value <= goal if at_most else value >= goal)
        return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met}

    return [
        row(f"select {millions}, written and hashed: ours", cpu["select/megakd"], "CPU s", None),
        row(f"select {millions}: MiniPLM's way over ours", cpu["select/miniplm"] / cpu["select/megakd"], "x", None),
        row(f"select {millions}: numpy in memory over ours", cpu["select/numpy"] / cpu["select/megakd"], "x", None),
        row("anonymous memory of ours", memory["select/megakd"], "MB", 50, at_most=True),
        row("anonymous memory of MiniPLM's way", memory["select/miniplm"], "MB", None),
        row(
            "copy what is kept (hashed, with index and manifest): MiniPLM's way over ours",
            cpu["copy/miniplm"] / cpu["copy/megakd"],
            "x",
            6,
        ),
        row("copy what is kept: one piece, not hashed, over ours", cpu["copy/bound"] / cpu["copy/megakd"], "x", 0.5),
        row("copy what is kept: our rate", kept_bytes / cpu["copy/megakd"] / 1e6, "MB/s", None),
    ]


def write_scores(work: Path, num_samples: int) -> None:
    """Both models' scores, as ours and as MiniPLM's shards of mean NLLs."""
    import torch

    common = np.random.default_rng(7).normal(2.6, 0.5, num_samples).astype(np.float32)
    for seed, (name, shift) in enumerate((("teacher", 0.0), ("reference", 0.35))):
        noise = np.random.default_rng(seed).normal(shift, 0.12, num_samples).astype(np.float32)
        log_probs = -SEQ_LENGTH * (common + noise)  # a power of two: the mean has the same bits
        pieces = [log_probs[at : at + PIECE] for at in range(0, num_samples, PIECE)]
        finish_scores(
            work / name,
            {LOG_PROBS: pieces, COUNTS: (np.full(len(piece), SEQ_LENGTH) for piece in pieces)},
            num_samples=num_samples,
            parameters={"packing": "concat", "seq_length": SEQ_LENGTH, "mask_policy": "all", "precision": "fp32"},
            parents={"dataset": "bench", "model": name},
            tokenizer=None,
        )
        (work / f"{name}.pt").mkdir()
        for shard, part in enumerate(np.array_split(-log_probs / SEQ_LENGTH, SHARDS)):
            torch.save(torch.from_numpy(part.copy()), work / f"{name}.pt" / f"scores_{shard}.pt")


def write_corpus(work: Path, num_samples: int) -> None:
    """A dataset and a selection of half of its samples."""
    rng = np.random.default_rng(5)
    with IndexedWriter(work / "data", np.uint16) as writer:
        for first in range(0, num_samples, 10_000):
            count = min(10_000, num_samples - first) * SEQ_LENGTH + (first + 10_000 >= num_samples)
            writer.add_documents(rng.integers(0, 32000, count, dtype=np.uint16), np.array([count]))
        dataset = writer.finish().fingerprint
    with SelectionWriter(work / "kept") as selection:
        selection.append(np.sort(rng.choice(num_samples, num_samples // 2, replace=False)))
        selection.finish(packing="concat", seq_length=SEQ_LENGTH, num_samples=num_samples, dataset=dataset, rule={})


def select_miniplm(work: Path, num_samples: int) -> Any:
    import torch

    torch.set_num_threads(1)

    def load(name: str) -> Any:
        shards = [torch.load(work / f"{name}.pt" / f"scores_{shard}.pt") for shard in range(SHARDS)]
        merged = torch.cat(shards, dim=0)
        torch.save(merged, work / f"{name}_merged.pt")
        return merged

    teacher, reference = load("teacher"), load("reference")
    difference = reference - teacher
    assert difference.max() > difference.min()
    torch.save(difference, work / "difference.pt")
    del teacher, reference
    difference = torch.load(work / "difference.pt")
    _, order = torch.sort(difference, descending=True)
    kept, _ = torch.sort(order[: int(RATIO * len(order))])
    return kept.numpy()


def select_numpy(work: Path, num_samples: int) -> Any:
    teacher, reference = (np.memmap(work / name / LOG_PROBS, np.float32, "r") for name in ("teacher", "reference"))
    difference = reference - teacher
    count = int(RATIO * num_samples)
    return np.sort(np.argpartition(difference, num_samples - count)[num_samples - count :])


def select_megakd(work: Path, num_samples: int) -> Any:
    (work / "out" / MANIFEST).unlink(missing_ok=True)  # a finished selection is not made again
    flags = ["--teacher-scores", work / "teacher", "--reference-scores", work / "reference"]
    config = parse(SelectConfig, [*map(str, flags), "--output", str(work / "out")], prog="", description="")
    return select(config, open_scored(config)).domains["out"].kept


def copy_miniplm(work: Path, num_samples: int) -> Any:
    """Neighbours share a token here; the peer's shards hold samples apart, so its items are as long as ours."""
    tokens = np.memmap(work / "data.bin", np.uint16, "r")
    kept = np.fromfile(work / "kept" / "ids.i64", np.int64)
    last_of_run = np.append(np.diff(kept) != 1, True)
    items = []
    for sample, last in zip(kept.tolist(), last_of_run.tolist()):
        item = np.array(tokens[sample * SEQ_LENGTH : (sample + 1) * SEQ_LENGTH + last], dtype=np.int64)
        items.append(item.astype(np.uint16))
    lengths = np.array([len(item) for item in items], dtype=np.int32)
    with open(work / "peer.bin", "wb") as stream:
        stream.write(np.concatenate(items).tobytes(order="C"))
    write_idx(work / "peer.idx", np.uint16, lengths)
    return work / "peer.bin"


def copy_megakd(work: Path, num_samples: int) -> Any:
    samples = ConcatSamples(IndexedDataset(work / "data"), SEQ_LENGTH)
    manifest_path(work / "ours").unlink(missing_ok=True)
    (work / "ours.idx").unlink(missing_ok=True)
    materialize(samples, Selection(work / "kept"), work / "ours")
    return work / "ours.bin"


def copy_bound(work: Path, num_samples: int) -> Any:
    """As many bytes in one piece from the mapped file to another; flushed to disk, as ours are."""
    size = os.path.getsize(work / "kept" / "ids.i64") // 8 * 2 * SEQ_LENGTH
    source = memoryview(np.memmap(work / "data.bin", np.uint8, "r"))
    with open(work / "bound.bin", "wb", buffering=0) as stream:
        for at in range(0, size, 1 << 24):
            stream.write(source[at : min(at + (1 << 24), size)])
        os.fsync(stream.fileno())
    return None


CASES: dict[str, Callable[[Path, int], Any]] = {
    "select/miniplm": select_miniplm,
    "select/numpy": select_numpy,
    "select/megakd": select_megakd,
    "copy/miniplm": copy_miniplm,
    "copy/megakd": copy_megakd,
    "copy/bound": copy_bound,
}


def run_case(name: str, work: Path, num_samples: int) -> None:
    """In a process of its own: times, memory and what must agree, as one line of JSON."""
    if "miniplm" in name:
        import torch  # noqa: F401
    os.sync()
    with AnonymousMemory() as memory:
        cpu, wall = time.process_time(), time.perf_counter()
        result = CASES[name](work, num_samples)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    agreed: list[int] = []
    if name.startswith("select"):
        if isinstance(result, int):
            agreed = [result]
        else:
            agreed = [len(result)]
            result.tofile(work / f"{name.replace('/', '-')}.ids")
    elif result is not None:
        import zlib

        agreed = [os.path.getsize(result), zlib.crc32(result.read_bytes())]
    print(json.dumps({"cpu": cpu, "wall": wall, "anonymous_MB": memory.most / 1e6, "result": agreed}))


class AnonymousMemory:
    """The most anonymous memory of this process above what it has now, looked at every millisecond."""

    def __enter__(self) -> AnonymousMemory:
        self._first = self.most = 0
        self._first = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, self._now() - self._first)

    def _now(self) -> int:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
