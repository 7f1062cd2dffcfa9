"""Selection by the book, for tests: every score in memory, a full sort, ties by the keyed hash."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megakd.data.scores.artefact import write_scores

MASK = (1 << 64) - 1
PARAMETERS = {"packing": "concat", "seq_length": 7, "mask_policy": "all", "precision": "fp32"}


def write(
    folder: Path,
    log_probs: Any,
    counts: Any,
    *,
    dataset: str = "d0",
    model: str = "m",
    tokenizer: Any = None,
    **other: Any,
) -> str:
    """Scores on disk, as ``megakd score`` leaves them."""
    write_scores(
        folder,
        np.asarray(log_probs, np.float32),
        np.asarray(counts, np.int32),
        parameters={**PARAMETERS, **other},
        parents={"dataset": dataset, "model": model},
        tokenizer=tokenizer,
    )
    return str(folder)


def hash_of(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def hash_key(purpose: str, seed: int, dataset: str) -> int:
    return int(xxhash.xxh3_64_intdigest(f"{purpose} {seed} {dataset}".encode()))


def scores_of(models: list[tuple[float, Any]], divisors: Any) -> Any:
    """``[n]`` float32: sum of weight * NLL / divisor; models are (weight, log_probs)."""
    total = np.zeros(len(models[0][1]), np.float64)
    with np.errstate(all="ignore"):
        for weight, log_probs in models:
            nll = -np.asarray(log_probs, np.float32) / np.asarray(divisors).astype(np.float32)
            total += np.float64(np.float32(weight)) * nll.astype(np.float64)
        return total.astype(np.float32)


def gumbel(ids: Any, seed: int, dataset: str) -> Any:
    key = hash_key("gumbel", seed, dataset)
    return np.array([-math.log(-math.log(((hash_of(i ^ key) >> 11) + 0.5) * 2.0**-53)) for i in ids])


def ordered(scores: Any, ids: Any, datasets: Any, seed: int) -> Any:
    """Places in the order of descending score, ties by descending hash."""
    hashes = [hash_of(int(i) ^ hash_key("tie", seed, d)) for i, d in zip(ids, datasets)]
    return sorted(range(len(ids)), key=lambda at: (-float(scores[at]), -hashes[at]))


def take(order: list[int], amounts: Any, budget: int) -> list[int]:
    """The longest beginning of the order whose amounts do not exceed the budget."""
    kept, total = [], 0
    for at in order:
        total += int(amounts[at])
        if total > budget:
            break
        kept.append(at)
    return kept
