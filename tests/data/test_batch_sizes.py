"""Batch sizes of a ramp against Megatron's rule, step by step, and the loader that takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import write_dataset

from megakd.data.batch_sizes import BatchSizes, Ramp
from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import Loader
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import UsageError

RAMPS = [(4, 4, 100, 16), (16, 16, 5_859, 1536), (2, 2, 7, 8), (1, 7, 1000, 8), (8, 8, 1, 16), (3, 1, 50, 5)]


def twin(start: int, increment: int, samples: int, size: int, consumed: int) -> int:
    """Megatron's rule as its documentation tells it: levels of equal length, the last size beyond them."""
    if consumed > samples:
        return size
    length = samples / ((size - start) // increment)
    return start + int(consumed / length) * increment


@pytest.mark.parametrize(("start", "increment", "samples", "size"), RAMPS)
def test_every_step_of_a_ramp(start: int, increment: int, samples: int, size: int) -> None:
    sizes = BatchSizes(size, Ramp(start, increment, samples))
    consumed, ends = 0, [0]
    for step in range(200):
        assert sizes.consumed_after(step) == consumed
        assert sizes.at(consumed) == twin(start, increment, samples, size, consumed) in sizes.levels
        consumed += sizes.at(consumed)
        ends.append(consumed)
    for number in range(0, ends[150], 3):
        assert sizes.steps_of(number) == sum(end <= number for end in ends) - 1
    for number in range(start, ends[150], 5):
        steps, taken = 0, 0  # Megatron's count of the steps of a run
        while taken <= samples and taken <= number:
            taken, steps = taken + sizes.at(taken), steps + 1
        assert sizes.train_iters(number) == steps + max(0, number - taken) // size


def test_without_a_ramp() -> None:
    sizes = BatchSizes(8)
    assert [sizes.at(0), sizes.consumed_after(3), sizes.steps_of(31), sizes.train_iters(31)] == [8, 24, 3, 3]


@pytest.mark.parametrize(
    "ramp", [(8, 1, 10), (16, 4, 10), (3, 4, 10), (0, 4, 10), (4, 0, 10), (4, 4, 0), (1, 1, 10**9)]
)
def test_ramps_that_do_not_come_to_the_size(ramp: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="--rampup-batch-size"):
        BatchSizes(8, Ramp(*ramp))


def test_the_order_is_the_same_with_a_ramp_and_after_a_resume(tmp_path: Path) -> None:
    blend = Blend([ConcatSamples(IndexedDataset(write_dataset(tmp_path / "data")), 16)], None, seed=3)

    def loader(ramp: Ramp | None, rank: int = 0, size: int = 1, state: object = None) -> Loader:
        return Loader(
            blend, seq_length=16, micro_batch_size=2, global_batch_size=16, data_parallel_rank=rank,
            data_parallel_size=size, rampup=ramp, state=state,  # type: ignore[arg-type]
        )  # fmt: skip

    ramp = Ramp(4, 4, 30)
    plain, ramped = loader(None), loader(ramp)
    steps = [next(ramped) for _ in range(8)]
    assert [len(step.sample_positions) for step in steps] == [4, 4, 4, 8, 12, 16, 16, 16]
    ids = np.concatenate([step.draws.sample_id for step in steps])
    assert (ids == np.concatenate([next(plain).draws.sample_id for _ in range(5)])).all()
    first = loader(ramp)
    for _ in range(4):
        next(first)
    continued = loader(ramp, state=first.state())
    assert [next(continued).num_microbatches for _ in range(3)] == [6, 8, 8]
    for step in steps:  # two ranks hold between them what one holds
        for rank in range(2):
            other = loader(ramp, rank, 2, {**first.state(), "consumed_samples": int(step.sample_positions[0])})
            rows = [microbatch.sample_ids_B for microbatch in next(other)]
            whole = step.draws.sample_id.reshape(-1, 2, 2)[:, rank]
            assert (np.stack(rows) == whole).all()
    with pytest.raises(UsageError, match="global_batch_size 6 is not a multiple"):
        loader(Ramp(6, 10, 10), size=2)
