"""The process pools that the other tests stand on: results, errors, deaths and hangs."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from worlds import RankError, World, Worlds


@dataclass(frozen=True)
class Value:
    tensor: torch.Tensor


def _sum(value: Value) -> Value:
    total = value.tensor + dist.get_rank()
    dist.all_reduce(total)
    return Value(total)


def _hides_gpus() -> tuple[bool, bool]:
    """Of this rank, and of the process that it was forked from, which has looked for devices already."""
    started_with = Path("/proc", str(os.getppid()), "environ").read_bytes().split(b"\0")
    return os.environ["CUDA_VISIBLE_DEVICES"] == "", b"CUDA_VISIBLE_DEVICES=" in started_with


def _pid() -> int:
    return os.getpid()


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("planted")


def _raise_while_others_wait() -> None:
    _raise_on_rank_1()
    dist.barrier()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_runs_on_every_rank_and_keeps_its_processes(world: Worlds) -> None:
    results = world(2).run(_sum, Value(torch.tensor([1.0])))
    assert [r.tensor.item() for r in results] == [3.0, 3.0]
    assert world(2).run(_pid) == world(2).run(_pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_sees_a_gpu(world: Worlds) -> None:
    assert world(2).run(_hides_gpus) == [(True, True)] * 2


def test_an_error_names_its_rank_and_leaves_the_world_usable(world: Worlds) -> None:
    pids = world(2).run(_pid)
    with pytest.raises(RankError, match="rank 1 of 2") as caught:
        world(2).run(_raise_on_rank_1)
    assert "planted" in str(caught.value) and "_raise_on_rank_1" in str(caught.value)
    assert world(2).run(_pid) == pids


@pytest.mark.slow
def test_errors_deaths_and_hangs_are_reported_in_seconds() -> None:
    world = World(2)
    try:
        world.run(_pid)
        for fn, message, timeout in (
            (_raise_while_others_wait, "planted", 100.0),
            (_die_on_rank_1, "rank 1 of 2: died with exit code 7", 100.0),
            (_hang_on_rank_1, "_hang_on_rank_1", 3.0),
        ):
            world.run(_pid)  # restarts after the previous failure
            start = time.monotonic()
            with pytest.raises(RankError, match=message):
                world.run(fn, timeout=timeout)
            assert time.monotonic() - start < 60
    finally:
        world.close()
