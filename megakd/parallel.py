"""Process groups of a run, built once and passed on; the only reader of megatron's ``parallel_state``."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megakd import cpu
from megakd.errors import UsageError
from megakd.layout import ParallelConfig, is_first_rank, world_size
from megakd.losses.vocab_parallel import VocabShard

if cpu.needed():
    cpu.install()
else:
    cpu.refuse_foreign_apex()

# The CPU layer above must come first, so modules of megakd that import megatron import this one before it.
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

_LAUNCHERS = "torchrun sets MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK; a launcher without it must, for every rank"


@dataclass(frozen=True)
class Groups:
    """Layout of all ranks: its sizes, this rank's place in it, and megatron's process groups."""

    parallel: ParallelConfig
    collection: ProcessGroupCollection
    rank: int
    world_size: int
    device: torch.device

    @property
    def tensor(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.collection.tp
        return group

    @property
    def tensor_rank(self) -> int:
        return int(self.collection.tp.rank())

    @property
    def context_rank(self) -> int:
        return int(self.collection.cp.rank())

    @property
    def data_rank(self) -> int:
        return int(self.collection.dp.rank())

    @property
    def data_size(self) -> int:
        return int(self.collection.dp.size())

    @property
    def pipeline_rank(self) -> int:
        return int(self.collection.pp.rank())

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.parallel.pipeline_model_parallel_size - 1

    def has_output(self, virtual_stage: int | None) -> bool:
        """Return True if model chunk ``virtual_stage`` of this rank ends the model."""
        chunks = self.parallel.virtual_pipeline_model_parallel_size
        return self.is_last_stage and (virtual_stage is None or virtual_stage == (chunks or 1) - 1)

    def has_input(self, virtual_stage: int | None) -> bool:
        """Return True if model chunk ``virtual_stage`` of this rank begins the model."""
        return self.is_first_stage and virtual_stage in (None, 0)

    def vocab_shard(self, vocab_size: int, *, padded_vocab_size: int) -> VocabShard:
        """Return this rank's rows of an output weight of ``padded_vocab_size`` rows, ``vocab_size`` of them for ids."""
        size = self.parallel.tensor_model_parallel_size
        rows = padded_vocab_size // size
        group = self.tensor if size > 1 else None
        return VocabShard(start=self.tensor_rank * rows, num_rows=rows, vocab_size=vocab_size, group=group)


def init_parallel(parallel: ParallelConfig, *, seed: int) -> Groups:
    """Join the world that torchrun started (or a world of one), build the student's groups and seed every generator.

    Raises:
        UsageError: the world size does not fit the layout.
    """
    num_ranks = world_size()
    parallel.data_parallel_size(num_ranks)
    device = _init_world(parallel, num_ranks)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=int(max(1, parallel.distributed_timeout_minutes)),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(parallel, collection, dist.get_rank(), dist.get_world_size(), device)


def order_kernels(parallel: ParallelConfig, environment: MutableMapping[str, str]) -> str | None:
    """Give each device one queue of kernels where tensor parallelism counts on their order; return a line about it.

    megatron-core starts a message beside a product and counts on the message being first in the queue
    (tensor_parallel/layers.py:526, 545); with several queues the message may wait for the product, which costs time and
    changes no result. A value that the user has set stays. None where nothing is to be said.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if parallel.tensor_model_parallel_size == 1 or environment.get(name) == "1":
        return None
    flag = "--sequence-parallel" if parallel.sequence_parallel else "--tensor-model-parallel-size"
    if name in environment:
        return (
            f"Warning: {name} is {environment[name]}: {flag} is faster with 1, so that messages start before the "
            "products beside them"
        )
    environment[name] = "1"
    return f"{name} is set to 1 for {flag}: messages start before the products beside them"


def build_groups(parallel: ParallelConfig, base: Groups) -> Groups:
    """Build the groups of a teacher's layout over the same ranks; those of ``base`` if the layouts are equal.

    Every rank must call it, with the same layout. Context parallelism is shared with ``base``.

    Raises:
        UsageError: the layout does not fit the world, or asks for another context parallel size.
    """
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    if parallel.context_parallel_size != base.parallel.context_parallel_size:
        raise UsageError(
            f"teacher: context_parallel_size {parallel.context_parallel_size} differs from the student's "
            f"{base.parallel.context_parallel_size}; both must split a sequence in the same way"
        )
    if all(getattr(parallel, name) == getattr(base.parallel, name) for name in sizes):
        return Groups(parallel, base.collection, base.rank, base.world_size, base.device)
    data = parallel.data_parallel_size(base.world_size)
    shape = [
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, data, parallel.pipeline_model_parallel_size
    ]  # fmt: skip
    timeout = datetime.timedelta(minutes=base.parallel.distributed_timeout_minutes)
    grid = HyperCommGrid(shape, ["tp", "cp", "dp", "pp"], backend=dist.get_backend())
    collection = ProcessGroupCollection()
    for name, dims in (
        ("tp", ["tp"]), ("cp", ["cp"]), ("dp", ["dp"]), ("pp", ["pp"]), ("mp", ["tp", "pp"]), ("tp_cp", ["tp", "cp"]),
        ("dp_cp", ["cp", "dp"]), ("tp_dp_cp", ["tp", "cp", "dp"]),
    ):  # fmt: skip
        setattr(collection, name, grid.create_pg(dims, timeout=timeout))
    collection.intra_dp_cp = collection.dp_cp
    for name in ("embd", "pos_embd", "ep", "hcp", "expt_tp", "tp_ep", "tp_ep_pp", "expt_dp"):
        setattr(collection, name, None)
    return Groups(parallel, collection, base.rank, base.world_size, base.device)


def random_states(groups: Groups) -> dict[str, Any]:
    """Return the states of this rank's random generators. They matter only with dropout."""
    states: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if groups.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set this rank's random generators to states that ``random_states`` returned in the same layout."""
    torch.set_rng_state(states["cpu"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _init_world(parallel: ParallelConfig, num_ranks: int) -> torch.device:
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        notice = order_kernels(parallel, os.environ)  # before the device has a context, which reads the variable
        if notice and is_first_rank():
            print(notice, flush=True)
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if dist.is_initialized():
        return device
    if device.type == "cpu":
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if "MASTER_ADDR" in os.environ:
        _meet(backend, timeout)
    elif num_ranks > 1:
        raise UsageError(f"WORLD_SIZE is {num_ranks} and MASTER_ADDR is not set: {_LAUNCHERS}")
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=num_ranks, timeout=timeout)
    return device


def _meet(backend: str, timeout: datetime.timedelta) -> None:
    """Join the other ranks at MASTER_ADDR and MASTER_PORT.

    Raises:
        UsageError: the environment does not give the place. ConnectionError: the other ranks were not met there.
    """
    numbers = {}
    for name, largest in (("MASTER_PORT", 65535), ("WORLD_SIZE", 2**31), ("RANK", 2**31)):
        text = os.environ.get(name)
        if text is None or not text.isdecimal() or int(text) > largest:
            told = "not set" if text is None else f"'{text}'"
            raise UsageError(f"{name} is {told}; expected a number up to {largest}: {_LAUNCHERS}")
        numbers[name] = int(text)
    host, port, rank = os.environ["MASTER_ADDR"], numbers["MASTER_PORT"], numbers["RANK"]
    place = f"{host}:{port} (MASTER_ADDR:MASTER_PORT)"
    limit = f"{timeout.total_seconds():g} seconds (--distributed-timeout-minutes)"
    if rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        reason = _wait_for_port(host, port, timeout.total_seconds())
        if reason is not None:
            raise ConnectionError(
                f"rank {rank} of {numbers['WORLD_SIZE']} met nobody at {place} within {limit}: {reason}; start rank 0 "
                "there, and give every rank an address and a port that its machine can reach"
            )
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:  # torch raises it for sockets, its store and gloo
        reason = str(error).split("\n")[0]
        if "failed to listen" in reason:
            raise ConnectionError(
                f"rank {rank} cannot listen at {place}: {reason}; give all ranks a free MASTER_PORT"
            ) from None
        raise ConnectionError(
            f"rank {rank} of {numbers['WORLD_SIZE']} did not meet all others at {place} within {limit}: {reason}"
        ) from None


def _wait_for_port(host: str, port: int, seconds: float) -> str | None:
    """Wait until something listens at a port; return None, or the reason why nothing was reached.

    Torch would print stack traces while it waits.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, min(10.0, seconds))):
                return None
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(0.2)
