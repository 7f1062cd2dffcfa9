"""A logits store: bytes a token, error, and the rates of writing and reading, beside other layouts.

    python benchmarks/bench_store.py [--rows 16384] [--vocab 32000] [--corpus-mb 60] [--json PATH]

Rows are those of a trigram model of the Python sources on this machine (store_teacher.py; the table begins with what it
is like) at whole samples of 1,024 positions. Writing begins with the listed ids and ends with committed shards; reading
ends with the int64 ids and fp32 log-probabilities that a loss takes, of samples in random order, hashes checked. One
thread; rates are of CPU seconds, the best of repeats that take turns. Peers:

- naive: fp16 log-probabilities and int32 ids;
- Megatron: fp16, the low 16 bits of the ids, one bool for bit 17, 1,024 rows a file, zstd level 3 over all of it;
- RS-KD: 17 bits of id and 7 of count an entry;
- bound: the decoded arrays, copied.

KL error is that of the K + 1 buckets, from the exact row to the stored one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from store_teacher import Trigram, tokenize

from megakd.logits.codec import Rows, frequency_ranks
from megakd.logits.spec import StoreSpec, finish_store, write_shard
from megakd.logits.store import LogitsStore

SEQ_LENGTH, TOP_K, DRAWS, BATCH = 1024, 100, 50, 4


def main() -> None:
    """Measure in turn, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384, help="rounded down to whole samples")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--corpus-mb", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache", type=Path, help="a .npz that keeps the teacher's rows for the next time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.vocab, options.corpus_mb, options.repeats = 4096, 2000, 1, 1
    teacher = load_teacher(options)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(teacher, Path(folder), options.repeats)
    for row in rows:
        goal = "" if row["goal"] is None else f"  goal {row['goal']}{'' if row['met'] else ': NOT MET'}"
        print(f"{row['name']:<76} {row['value']:>10.4g} {row['unit']}{goal}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


@dataclass(frozen=True)
class Teacher:
    """ids, log_probs: ``[T, 100]``, best first. draws: ``[T, 50]``. input_ids: ``[T]``. counts: of each id."""

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    draws: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    counts: NDArray[np.int64]


def load_teacher(options: argparse.Namespace) -> Teacher:
    if options.cache and options.cache.exists():
        return Teacher(**np.load(options.cache))
    tokens = tokenize(options.vocab, int(options.corpus_mb * 1e6))
    model = Trigram(tokens, options.vocab)
    rng = np.random.default_rng(1)
    firsts = rng.integers(1, len(tokens) - SEQ_LENGTH, options.rows // SEQ_LENGTH)
    positions = (firsts[:, None] + np.arange(SEQ_LENGTH)).ravel()
    parts: list[dict[str, Any]] = []
    for seed, chunk in enumerate(np.array_split(positions, len(positions) // 256)):
        log_probs = model.log_probs(chunk, seed)
        best = np.argpartition(-log_probs, TOP_K, 1)[:, :TOP_K]
        values = np.take_along_axis(log_probs, best, 1)
        order = np.argsort(-values, 1, kind="stable")
        probs = np.exp(log_probs, dtype=np.float64)
        mass = probs.cumsum(1)
        uniform = rng.random((len(chunk), DRAWS)) * mass[:, -1:]
        parts.append(
            {
                "ids": np.take_along_axis(best, order, 1),
                "log_probs": np.take_along_axis(values, order, 1),
                "entropy": -(probs * log_probs).sum(1, dtype=np.float32),
                "draws": np.stack([np.searchsorted(m, u, side="right") for m, u in zip(mass, uniform)]),
                "input_ids": tokens[chunk],
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    teacher = Teacher(**joined, counts=np.bincount(tokens, minlength=options.vocab))
    if options.cache:
        np.savez(options.cache, **vars(teacher))
    return teacher


def measure(teacher: Teacher, work: Path, repeats: int) -> list[dict[str, Any]]:
    num_rows = len(teacher.ids)
    mass = np.exp(teacher.log_probs.astype(np.float64))
    nucleus = np.where(mass.cumsum(1) - mass < 0.95, teacher.log_probs, np.float32(-np.inf))[:, :50]
    ids, counts = count(teacher.draws)
    unique = (counts > 0).sum(1)
    order = np.argsort(unique, kind="stable")
    few = np.sort(order[: np.searchsorted(unique[order].cumsum() / np.arange(1, num_rows + 1), 12, side="right")])
    top = Rows(teacher.ids, teacher.log_probs, teacher.entropy)
    sampled = Rows.from_counts(ids, counts, teacher.entropy, draws=DRAWS)
    cases = {
        "top-100, 8 bits": Case("top_p_k", 8, top),
        "top-100, 16 bits": Case("top_p_k", 16, top),
        "top-100, 32 bits": Case("top_p_k", 32, top),
        "top-p 0.95, k 50": Case("top_p_k", 8, Rows(teacher.ids[:, :50], nucleus, teacher.entropy)),
        "50 draws": Case("samples", 8, sampled),
        "50 draws, the rows with 12 unique ids on average": Case("samples", 8, rows_at(sampled, few)),
    }
    ours = {name: Ours(case, teacher, work / str(at)) for at, (name, case) in enumerate(cases.items())}
    actions: dict[str, Callable[[], object]] = {}
    for name, case in ours.items():
        actions[f"write {name}"], actions[f"read {name}"] = case.write, case.read
    peers = {"naive": Naive(top), "Megatron": Megatron(top), "bound": Copy(top)}
    actions |= {f"read {name}": peer.read for name, peer in peers.items()}
    cpu = {name: float("inf") for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            cpu[name] = min(cpu[name], time.process_time() - begin)

    def row(name: str, value: float, unit: str, goal: float | None = None, *, at_most: bool = False) -> dict[str, Any]:
        met = goal is None or (value <= goal if at_most else value >= goal)
        return {"name": name, "value": float(value), "unit": unit, "goal": goal, "met": bool(met)}

    entropy, listed = float(teacher.entropy.mean()), float(mass.sum(1).mean())
    table = [
        row("teacher: entropy", entropy, "nats"),
        row("teacher: mass of the top 100", listed, ""),
        row("teacher: unique ids of 50 draws", float(unique.mean()), "ids"),
        row("teacher: ids of top-p 0.95, k 50", float((nucleus > -np.inf).sum(1).mean()), "ids"),
    ]
    goals = dict(zip(cases, (160.0, None, None, 100.0, None, 27.0)))
    for name, case in ours.items():
        table.append(row(f"{name}: size", case.bytes_a_row, "B/token", goals[name], at_most=True))
        if case.kind == "top_p_k":
            kl, worst = case.errors()
            table.append(row(f"{name}: KL error, mean", kl, "nats", 1e-3, at_most=True))
            table.append(row(f"{name}: largest error of a log-probability", worst, "nats"))
        size = len(case.rows.entropy_T) / 1e3
        is_goal = name == "top-100, 8 bits"
        table.append(row(f"{name}: write", size / cpu[f"write {name}"], "ktoken/s", 200.0 if is_goal else None))
        table.append(row(f"{name}: read", size / cpu[f"read {name}"], "ktoken/s", 1000.0 if is_goal else None))
    for name in ("naive", "Megatron"):
        table.append(row(f"top-100, {name}: size", peers[name].bytes_a_row, "B/token"))
        table.append(row(f"top-100, {name}: read", num_rows / 1e3 / cpu[f"read {name}"], "ktoken/s"))
        ratio = peers[name].bytes_a_row / ours["top-100, 8 bits"].bytes_a_row
        table.append(row(f"top-100: size of {name} over ours", ratio, "x"))
    table.append(row("50 draws, RS-KD: size", 3 * float(unique.mean()), "B/token"))
    table.append(row("50 draws: size of RS-KD over ours", 3 * float(unique.mean()) / ours["50 draws"].bytes_a_row, "x"))
    table.append(row("top-100, bound: copy of the arrays", num_rows / 1e3 / cpu["read bound"], "ktoken/s"))
    return table


@dataclass(frozen=True)
class Case:
    kind: Any
    value_bits: Any
    rows: Rows


class Ours:
    """A store of these rows, written anew by `write`."""

    def __init__(self, case: Case, teacher: Teacher, folder: Path) -> None:
        self.kind, self.rows, self._folder = case.kind, case.rows, folder
        samples = -(-case.rows.num_rows // SEQ_LENGTH)
        self._inputs = teacher.input_ids[: samples * SEQ_LENGTH].reshape(samples, SEQ_LENGTH)
        self._ranks = frequency_ranks(teacher.counts)
        self._spec = StoreSpec(
            kind=case.kind,
            value_bits=case.value_bits,
            draws=DRAWS if case.kind == "samples" else 0,
            vocab_size=len(teacher.counts),
            packing="concat",
            seq_length=SEQ_LENGTH,
            num_samples=samples,
            shard_samples=samples,
            parents={"dataset": "bench", "model": "bench"},
        )
        self.write()
        self._store = LogitsStore(folder)
        record = self._store.manifest.parameters["shards"][0]
        self.bytes_a_row = (record[1] + record[2]) / self.rows.num_rows

    def write(self) -> None:
        writer = write_shard(self._folder, self._spec, self._ranks, 0)
        for sample in range(self._spec.num_samples):
            part = slice(sample * SEQ_LENGTH, (sample + 1) * SEQ_LENGTH)
            own = rows_at(self.rows, part)
            writer.add(sample, self._inputs[sample][: own.num_rows], own)
        writer.commit()
        finish_store(self._folder, self._spec, self._ranks)

    def read(self) -> None:
        order = np.random.default_rng(0).permutation(self._spec.num_samples)
        for at in range(0, len(order), BATCH):
            self._store.read_batch(order[at : at + BATCH], self._inputs[order[at : at + BATCH]])

    def errors(self) -> tuple[float, float]:
        """Mean KL error and the largest error of a value."""
        kl, worst = [], 0.0
        for sample in range(self._spec.num_samples):
            own = rows_at(self.rows, slice(sample * SEQ_LENGTH, (sample + 1) * SEQ_LENGTH))
            found = self._store.read(sample, self._inputs[sample])
            assert found is not None
            x, y = by_id(own), by_id(found)
            listed = x > -np.inf
            p, q = np.exp(x), np.exp(y)
            difference = np.where(listed, x, 0) - np.where(listed, y, 0)
            tail_p, tail_q = (np.maximum(1 - mass.sum(1), 1e-12) for mass in (p, q))
            kl.append((p * difference).sum(1) + tail_p * np.log(tail_p / tail_q))
            worst = max(worst, float(np.abs(difference).max()))
        return float(np.concatenate(kl).mean()), worst


class Naive:
    def __init__(self, rows: Rows) -> None:
        self._shape = rows.ids_TK.shape
        self._values, self._ids = rows.log_probs_TK.astype(np.float16).tobytes(), rows.ids_TK.astype("<i4").tobytes()
        self.bytes_a_row = (len(self._values) + len(self._ids)) / rows.num_rows

    def read(self) -> object:
        values = np.frombuffer(self._values, np.float16).reshape(self._shape).astype(np.float32)
        return values, np.frombuffer(self._ids, "<i4").reshape(self._shape).astype(np.int64)


class Megatron:
    def __init__(self, rows: Rows) -> None:
        self._files = []
        for at in range(0, rows.num_rows, SEQ_LENGTH):
            part = rows_at(rows, slice(at, at + SEQ_LENGTH))
            columns = (part.log_probs_TK.astype(np.float16), part.ids_TK.astype(np.uint16), part.ids_TK > 0xFFFF)
            self._files.append(zstandard.compress(b"".join(column.tobytes() for column in columns), 3))
        self.bytes_a_row = sum(map(len, self._files)) / rows.num_rows

    def read(self) -> object:
        for file in self._files:
            raw = zstandard.decompress(file)
            size = len(raw) // 5
            values = np.frombuffer(raw, np.float16, size).astype(np.float32)
            ids = np.frombuffer(raw, np.uint16, size, 2 * size).astype(np.int64)
            ids |= np.frombuffer(raw, np.bool_, size, 4 * size).astype(np.int64) << 16
        return values, ids


class Copy:
    bytes_a_row = float("nan")

    def __init__(self, rows: Rows) -> None:
        self._from = rows.ids_TK, rows.log_probs_TK
        self._to = np.empty_like(rows.ids_TK), np.empty_like(rows.log_probs_TK)

    def read(self) -> object:
        for source, target in zip(self._from, self._to):
            np.copyto(target, source)
        return self._to


def count(draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids ``[T, K]`` and how often each was drawn."""
    found = [np.unique(row, return_counts=True) for row in draws]
    width = max(len(ids) for ids, _ in found)
    ids, counts = np.zeros((len(draws), width), np.int64), np.zeros((len(draws), width), np.int32)
    for row, (own, times) in enumerate(found):
        ids[row, : len(own)], counts[row, : len(own)] = own, times
    return ids, counts


def rows_at(rows: Rows, at: Any) -> Rows:
    return Rows(rows.ids_TK[at], rows.log_probs_TK[at], rows.entropy_T[at])


def by_id(rows: Rows) -> NDArray[np.float64]:
    """``[T, K]``: log-probabilities in the order of their ids, empty slots last."""
    order = np.argsort(np.where(rows.log_probs_TK > -np.inf, rows.ids_TK, np.iinfo(np.int64).max), 1, kind="stable")
    return np.take_along_axis(rows.log_probs_TK, order, 1).astype(np.float64)


if __name__ == "__main__":
    main()
