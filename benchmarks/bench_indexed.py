"""Indexed datasets against megatron-core: writing the index, opening, fetching samples.

    python benchmarks/bench_indexed.py [--documents 5000000] [--repeats 5] [--json PATH]

Each ratio is megatron-core's time over megakd's, both medians of repeats that alternate in one process. Both sides make
or read the same bytes, which is checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter, write_idx
from megakd.data.indexed.idx_format import bin_path, idx_path
from megakd.data.samples.concat import ConcatSamples

SEQ_LENGTH = 2048
MEAN_TOKENS = 256
NUM_FETCHED = 4096
SHORT = 4  # tokens a document where the index is what is measured
BATCH = 10_000  # 40 kB of tokens a call: less than a batch of real documents has


def main() -> None:
    """Print the table, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if importlib.util.find_spec("megatron.core") is None:
        print("skipped: megatron-core is not installed, so there is nothing to compare with")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        rows = measure(Path(folder), arguments.documents, arguments.repeats)
    print(f"\n{'work':<58} {'megatron':>10} {'megakd':>10} {'ratio':>7} {'goal':>7}")
    for row in rows:
        peer, ours = row["peer_seconds"], row["seconds"]
        verdict = "" if row["goal"] is None else f"{row['goal']:>6}x {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<58} {_time(peer):>10} {_time(ours):>10} {row['value']:>6.1f}x {verdict}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(folder: Path, num_documents: int, repeats: int) -> list[dict[str, Any]]:
    """All rows; ``value`` is a ratio of times, ``goal`` None where the line is there for information."""
    from megatron.core.datasets import indexed_dataset as megatron

    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, num_documents), 2, 20000).astype(np.int32)
    prefix = folder / "data"
    _write_dataset(prefix, lengths)
    rows = []

    def compare(
        name: str, peer: Callable[[], object], ours: Callable[[], object], goal: float | None, n: int = repeats
    ) -> None:
        peer_seconds, seconds = _medians(peer, ours, n)
        ratio = peer_seconds / seconds
        rows.append({
            "name": name, "value": ratio, "unit": "x", "goal": goal, "met": goal is None or ratio >= goal,
            "peer_seconds": peer_seconds, "seconds": seconds,
        })  # fmt: skip
        print(f"{name}: {ratio:.1f}x", flush=True)

    listed, boundaries = lengths.tolist(), list(range(num_documents + 1))

    def finalize() -> None:
        builder = megatron.IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=np.uint16)
        builder.sequence_lengths, builder.document_indices = listed, boundaries
        builder.finalize(str(folder / "peer.idx"))

    millions = f"{num_documents / 1e6:g} M documents"
    compare(
        f".idx, {millions}, from the lengths",
        finalize,
        lambda: write_idx(folder / "ours.idx", np.uint16, lengths),
        None,
    )
    assert (folder / "ours.idx").read_bytes() == (folder / "peer.idx").read_bytes()

    tokens = np.arange(SHORT, dtype=np.uint16)
    batch_tokens, batch_lengths = np.tile(tokens, BATCH), np.full(BATCH, SHORT, dtype=np.int32)

    def build() -> None:
        builder = megatron.IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=np.uint16)
        for _ in range(num_documents):
            builder.add_document(tokens, [SHORT])
        builder.data_file.close()
        builder.finalize(str(folder / "peer.idx"))

    def write() -> None:
        with IndexedWriter(folder / "ours", np.uint16) as writer:
            for start in range(0, num_documents, BATCH):
                count = min(BATCH, num_documents - start)
                writer.add_documents(batch_tokens[: count * SHORT], batch_lengths[:count])
            writer.finish()

    compare(f"add {millions} of {SHORT} tokens, finish", build, write, 30, max(1, repeats // 2))
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "peer").read_bytes()

    compare(
        f"open, {millions}",
        lambda: megatron.IndexedDataset(str(prefix)),
        lambda: IndexedDataset(prefix),
        0.4,  # reading the manifest as well costs a tenth of a millisecond
        4 * repeats,
    )
    _compare_fetches(prefix, compare)
    return rows


def _compare_fetches(prefix: Path, compare: Callable[..., None]) -> None:
    from megatron.core.datasets import indexed_dataset as megatron
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, eos = 32000, 0, 31999, 0
        unique_identifiers = {"class": "bench"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH, split="1,0,0", reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, tokenizer=Tokenizer(), blend=None, mmap_bin_files=True,
        path_to_cache=str(prefix.parent / "cache"),
    )  # fmt: skip
    theirs = megatron.IndexedDataset(str(prefix))
    peer = GPTDataset(theirs, str(prefix), np.arange(len(theirs), dtype=np.int32), None, Split.train, config)
    ours = ConcatSamples(IndexedDataset(prefix), SEQ_LENGTH)
    ids = np.random.default_rng(4).integers(0, min(len(peer), ours.num_samples), NUM_FETCHED)
    listed = ids.tolist()
    microbatches = np.split(ids, len(ids) // 8)

    def tokens_only() -> None:
        for sample in listed:
            peer._query_document_sample_shuffle_indices(sample)

    def items() -> None:
        for sample in listed:
            peer[sample]

    def fetch() -> None:
        for microbatch in microbatches:
            ours.read(microbatch)

    def fetch_one() -> None:
        for sample in ids:
            ours.read(np.array([sample]))

    ours.read(np.arange(ours.num_samples)[:: max(1, ours.num_samples // 1000)])
    compare(f"fetch samples of {SEQ_LENGTH}, 8 at a time, against tokens only", tokens_only, fetch, 2)
    compare(f"fetch samples of {SEQ_LENGTH}, one at a time, against tokens only", tokens_only, fetch_one, None)
    compare(f"fetch samples of {SEQ_LENGTH}, 8 at a time, against items", items, fetch, None)


def _write_dataset(prefix: Path, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    rng = np.random.default_rng(2)
    with IndexedWriter(prefix, np.uint16) as writer:
        for part in np.array_split(lengths, max(1, len(lengths) // 100_000)):
            writer.add_documents(rng.integers(0, 32000, int(part.sum()), dtype=np.uint16), part)
        writer.finish()
    assert idx_path(prefix).exists()


def _medians(peer: Callable[[], object], ours: Callable[[], object], repeats: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for side, work in enumerate((peer, ours)):
            os.sync()  # or the side that fsyncs would also write out what the other has left in the cache
            start = time.perf_counter()
            work()
            if repeat:  # the first round warms caches and pages
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
