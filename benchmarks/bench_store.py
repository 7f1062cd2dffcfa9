"""A logits store: bytes a token, error, and the rates of writing and reading, beside other layouts.

    python benchmarks/bench_store.py [--rows 16384] [--vocab 32000] [--corpus-mb 60] [--json PATH]
    python benchmarks/bench_store.py --top-k-store DIR --samples-store DIR --data-path PREFIX [--json PATH]

Rows are those of a trigram model of the Python sources on this machine (store_teacher.py; the table begins with what it
is like) at whole samples of 1,024 positions, or those that two captures of a trained model have:

    megakd capture --load ... --data-path PREFIX --seq-length 256 --top-k 128 --top-p 1 --value-bits 32 ...
    megakd capture --load ... --data-path PREFIX --seq-length 256 --kind samples ...

Writing begins with the listed ids and ends with committed shards; reading ends with the int64 ids and fp32
log-probabilities that a loss takes, of samples in random order, hashes checked. One thread; rates are of CPU seconds,
the best of repeats that take turns. Peers are in store_peers.py; RS-KD: 17 bits of id and 7 of count an entry; bound:
the decoded arrays, copied, and the store's own bytes, copied from the memory map.

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
from numpy.typing import NDArray
from store_peers import Copy, DistillKit, Megatron, Naive, rows_at
from store_teacher import DRAWS, Teacher, captured_teacher, trigram_teacher

from megakd.logits.codec import Rows, rank_by_frequency
from megakd.logits.spec import StoreSpec, shard_path
from megakd.logits.store import LogitsStore
from megakd.logits.store_writer import finish_store, write_shard

BATCH = 4


def main() -> None:
    """Measure in turn, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384, help="rounded down to whole samples")
    parser.add_argument("--vocab", type=int, default=32000, help="of the trigram model")
    parser.add_argument("--corpus-mb", type=float, default=60, help="of the trigram model")
    parser.add_argument("--top-k-store", type=Path, help="rows of a trained model instead: 128 best ids, 32 bits")
    parser.add_argument("--samples-store", type=Path, help="and 50 draws of it")
    parser.add_argument("--data-path", help="and what both were captured from")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.vocab, options.corpus_mb, options.repeats = 4096, 2000, 1, 1
    given = options.top_k_store, options.samples_store, options.data_path
    if any(given) and not all(given):
        parser.error("--top-k-store, --samples-store and --data-path go together")
    if options.data_path:
        teacher = captured_teacher(*given, options.rows)
    else:
        corpus_bytes = int(options.corpus_mb * 1e6)
        teacher = trigram_teacher(options.rows, vocab_size=options.vocab, corpus_bytes=corpus_bytes)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(teacher, Path(folder), options.repeats)
    for row in rows:
        goal = "" if row["goal"] is None else f"  goal {row['goal']}{'' if row['met'] else ': NOT MET'}"
        print(f"{row['name']:<76} {row['value']:>10.4g} {row['unit']}{goal}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(teacher: Teacher, work: Path, repeats: int) -> list[dict[str, Any]]:
    num_rows = len(teacher.entropy_T)
    widest = Rows(teacher.ids_TK, teacher.log_probs_TK, teacher.entropy_T)
    top, top_50 = first_ids(widest, 100), first_ids(widest, 50)
    mass = np.exp(top.log_probs_TK.astype(np.float64))
    nucleus = np.where(mass.cumsum(1) - mass < 0.95, top.log_probs_TK, np.float32(-np.inf))[:, :50]
    unique = (teacher.drawn_counts_TD > 0).sum(1)
    order = np.argsort(unique, kind="stable")
    few = np.sort(order[: np.searchsorted(unique[order].cumsum() / np.arange(1, num_rows + 1), 12, side="right")])
    sampled = Rows.from_counts(teacher.drawn_ids_TD, teacher.drawn_counts_TD, teacher.entropy_T, draws=DRAWS)
    cases = {
        "top-100, 8 bits": Case("top_p_k", 8, top),
        "top-100, 16 bits": Case("top_p_k", 16, top),
        "top-100, 32 bits": Case("top_p_k", 32, top),
        "top-p 0.95, k 50": Case("top_p_k", 8, Rows(top_50.ids_TK, nucleus, top.entropy_T)),
        "50 draws": Case("samples", 8, sampled),
        "50 draws, the rows with 12 unique ids on average": Case("samples", 8, rows_at(sampled, few)),
    }
    ours = {name: Ours(case, teacher, work / str(at)) for at, (name, case) in enumerate(cases.items())}
    kit = {
        "DistillKit, 128 ids, 16 exact": (widest, DistillKit(widest, exact=16, degrees=(0, 1, 2, 3, 4, 0.5))),
        "DistillKit, 50 ids, 1 exact": (top_50, DistillKit(top_50, exact=1, degrees=(0, 1, 0.5))),
        "DistillKit, 100 ids, 4 exact, 8 bits": (top, DistillKit(top, exact=4, residual_bits=8)),
    }
    peers: dict[str, Any] = {"naive": Naive(top), "Megatron": Megatron(top)} | {
        name: peer for name, (_, peer) in kit.items()
    }
    actions: dict[str, Callable[[], object]] = {}
    for name, case in ours.items():
        actions[f"write {name}"], actions[f"read {name}"] = case.write, case.read
    actions |= {f"read {name}": peer.read for name, peer in peers.items()}
    actions |= {"arrays": Copy(top).read, "bytes": ours["top-100, 8 bits"].copy_bytes}
    cpu = {name: float("inf") for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            cpu[name] = min(cpu[name], time.process_time() - begin)

    def row(name: str, value: float, unit: str, goal: float | None = None, *, at_most: bool = False) -> dict[str, Any]:
        met = goal is None or (value <= goal if at_most else value >= goal)
        return {"name": name, "value": float(value), "unit": unit, "goal": goal, "met": bool(met)}

    entropy, kept_mass = float(teacher.entropy_T.mean()), float(mass.sum(1).mean())
    table = [
        row("teacher: vocabulary", len(teacher.counts_V), "ids"),
        row("teacher: entropy", entropy, "nats"),
        row("teacher: mass of the top 100", kept_mass, ""),
        row("teacher: unique ids of 50 draws", float(unique.mean()), "ids"),
        row("teacher: ids of top-p 0.95, k 50", float((nucleus > -np.inf).sum(1).mean()), "ids"),
    ]
    goals = dict(zip(cases, (160.0, None, None, 100.0, None, 27.0)))
    for name, case in ours.items():
        table.append(row(f"{name}: size", case.bytes_a_row, "B/token", goals[name], at_most=True))
        if case.kind == "top_p_k":
            kl, worst = errors(case.rows, case.stored())
            table.append(row(f"{name}: KL error, mean", kl, "nats", 1e-3, at_most=True))
            table.append(row(f"{name}: largest error of a log-probability", worst, "nats"))
        size = len(case.rows.entropy_T) / 1e3
        is_goal = name == "top-100, 8 bits"
        table.append(row(f"{name}: write", size / cpu[f"write {name}"], "ktoken/s", 200.0 if is_goal else None))
        table.append(row(f"{name}: read", size / cpu[f"read {name}"], "ktoken/s", 1000.0 if is_goal else None))
    table.append(row("top-100, Megatron, not compressed: size", peers["Megatron"].raw_bytes_a_row, "B/token"))
    table.append(row("128 ids, Megatron, not compressed, bit 17 packed: size", 128 * (2 + 2 + 1 / 8), "B/token"))
    for name, peer in peers.items():
        title = name if name in kit else f"top-100, {name}"
        table.append(row(f"{title}: size", peer.bytes_a_row, "B/token"))
        if name in kit:
            table.append(row(f"{title}: KL error, mean", errors(kit[name][0], peer.read())[0], "nats"))
        table.append(row(f"{title}: read", num_rows / 1e3 / cpu[f"read {name}"], "ktoken/s"))
        beside = "top-p 0.95, k 50" if "50 ids" in name else "top-100, 8 bits"
        table.append(row(f"{title}: size over ours of {beside}", peer.bytes_a_row / ours[beside].bytes_a_row, "x"))
    table.append(row("50 draws, RS-KD: size", 3 * float(unique.mean()), "B/token"))
    table.append(row("50 draws: size of RS-KD over ours", 3 * float(unique.mean()) / ours["50 draws"].bytes_a_row, "x"))
    table.append(row("top-100, bound: copy of the arrays", num_rows / 1e3 / cpu["arrays"], "ktoken/s"))
    table.append(row("top-100, bound: copy of the store's bytes", num_rows / 1e3 / cpu["bytes"], "ktoken/s"))
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
        self._length = teacher.seq_length
        samples = -(-case.rows.num_rows // self._length)
        self._inputs = teacher.input_ids_T[: samples * self._length].reshape(samples, self._length)
        self._ranks = rank_by_frequency(teacher.counts_V)
        self._spec = StoreSpec(
            kind=case.kind,
            value_bits=case.value_bits,
            draws=DRAWS if case.kind == "samples" else 0,
            vocab_size=len(teacher.counts_V),
            packing="concat",
            seq_length=self._length,
            num_samples=samples,
            shard_samples=samples,
            parents={"dataset": "bench", "model": "bench"},
        )
        self.write()
        self._store = LogitsStore(folder)
        record = self._store.manifest.parameters["shards"][0]
        self.bytes_a_row = (record[1] + record[2]) / self.rows.num_rows
        first = shard_path(folder, 0)
        self._files = [path for path in first.parent.iterdir() if path != first]

    def write(self) -> None:
        writer = write_shard(self._folder, self._spec, self._ranks, 0)
        for sample in range(self._spec.num_samples):
            own = rows_at(self.rows, slice(sample * self._length, (sample + 1) * self._length))
            writer.add(sample, self._inputs[sample][: own.num_rows], own)
        writer.commit()
        finish_store(self._folder, self._spec, self._ranks)

    def read(self) -> None:
        order = np.random.default_rng(0).permutation(self._spec.num_samples)
        for at in range(0, len(order), BATCH):
            self._store.read_batch(order[at : at + BATCH], self._inputs[order[at : at + BATCH]])

    def stored(self) -> Rows:
        """All rows, decoded."""
        ids = np.arange(self._spec.num_samples)
        found = self._store.read_batch(ids, self._inputs)
        flat = (array.reshape(self._inputs.size, -1) for array in (found.ids_BSK, found.log_probs_BSK))
        return rows_at(Rows(*flat, found.entropy_BS.ravel()), slice(0, self.rows.num_rows))

    def copy_bytes(self) -> object:
        """Lower bound of reading: the shard's bytes out of the memory map, in order."""
        return [np.array(np.memmap(path, np.uint8, "r")) for path in self._files]


def errors(exact: Rows, stored: Rows) -> tuple[float, float]:
    """Mean KL error and the largest error of a value."""
    kl, worst = [], 0.0
    for at in range(0, exact.num_rows, 1024):
        part = slice(at, at + 1024)
        x, y = by_id(rows_at(exact, part)), by_id(rows_at(stored, part))
        width = max(x.shape[1], y.shape[1])
        x, y = (np.pad(z, ((0, 0), (0, width - z.shape[1])), constant_values=-np.inf) for z in (x, y))
        listed = x > -np.inf
        p, q = np.exp(x), np.exp(y)
        difference = np.where(listed, x, 0) - np.where(listed, y, 0)
        tail_p, tail_q = (np.maximum(1 - mass.sum(1), 1e-12) for mass in (p, q))
        kl.append((p * difference).sum(1) + tail_p * np.log(tail_p / tail_q))
        worst = max(worst, float(np.abs(difference).max()))
    return float(np.concatenate(kl).mean()), worst


def first_ids(rows: Rows, number: int) -> Rows:
    return Rows(rows.ids_TK[:, :number], rows.log_probs_TK[:, :number], rows.entropy_T)


def by_id(rows: Rows) -> NDArray[np.float64]:
    """``[T, K]``: log-probabilities in the order of their ids, empty slots last."""
    order = np.argsort(np.where(rows.log_probs_TK > -np.inf, rows.ids_TK, np.iinfo(np.int64).max), 1, kind="stable")
    return np.take_along_axis(rows.log_probs_TK, order, 1).astype(np.float64)


if __name__ == "__main__":
    main()
