"""Logits of a frozen model of ours, from any checkpoint or folder; inside a world of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.loader import Microbatch
from megakd.layout import ParallelConfig


class OneStep:
    """A step of one microbatch, in the form in which a teacher takes it."""

    num_microbatches = 1

    def __init__(self, tokens_BS: NDArray[np.int64]) -> None:
        zeros = np.zeros(len(tokens_BS), np.int64)
        self._microbatch = Microbatch(tokens_BS, tokens_BS, np.ones(tokens_BS.shape, np.bool_), zeros, zeros)

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        return self._microbatch


def frozen_logits(
    paths: list[str], sizes: dict[str, Any], tokens_BS: NDArray[np.int64]
) -> list[NDArray[np.float32] | None]:
    """This rank's columns of the logits ``[B, S, v]`` of each model; None on stages without a head."""
    import torch

    from megakd.model.checkpoint.record import read_record
    from megakd.parallel import init_parallel
    from megakd.pipeline.frozen.model import build_frozen, vocab_shard

    groups = init_parallel(ParallelConfig(**sizes), seed=1)
    results: list[NDArray[np.float32] | None] = []
    for path in paths:
        record = read_record(path)
        shape = record.shape.frozen(transformer_impl="local", bf16=False, fp8_format=None, fp8_recipe="tensorwise")
        teacher = build_frozen(record, shape, groups, seq_length=tokens_BS.shape[1])
        (targets,) = list(teacher.targets(OneStep(tokens_BS))) or [None]  # type: ignore[arg-type]
        if targets is None:
            results.append(None)
            continue
        shard = vocab_shard(record, shape, groups)
        rows = max(0, min(shard.num_rows, record.vocab_size - shard.start))
        with torch.no_grad():
            logits = targets.hidden_TH @ targets.weight_vH[:rows].T
        by_token = logits.view(tokens_BS.shape[1], tokens_BS.shape[0], rows).transpose(0, 1)
        results.append(by_token.float().numpy())
    return results


def joined(by_rank: list[list[NDArray[np.float32] | None]]) -> list[NDArray[np.float32]]:
    """Logits of the whole vocabulary of each model: the ranks' columns side by side."""
    columns = [[part for part in parts if part is not None] for parts in zip(*by_rank)]
    return [np.concatenate(parts, axis=-1) for parts in columns]
