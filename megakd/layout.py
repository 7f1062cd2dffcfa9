"""Layout of ranks over tensor, context, data and pipeline parallelism: sizes, arithmetic, refusals. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megakd.config.tree import option
from megakd.errors import UsageError

_MINUTES_OF_A_YEAR = 525_600


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups, with Megatron's names."""

    tensor_model_parallel_size: int = option(1, "number of ranks that share one layer (TP)", common=True)
    pipeline_model_parallel_size: int = option(1, "number of pipeline stages (PP)", common=True)
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "model chunks per pipeline stage (interleaved schedule)", common=True
    )
    context_parallel_size: int = option(1, "number of ranks that share one sequence (CP)", common=True)
    expert_model_parallel_size: int = option(1, "number of ranks that share the experts of one layer (EP)")
    expert_tensor_parallel_size: int = option(1, "number of ranks that share one expert (ETP)")
    sequence_parallel: bool = option(False, "split activations between layers along the sequence too", common=True)
    use_distributed_optimizer: bool = option(False, "split optimizer state over data-parallel ranks", common=True)
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = option(False, "gather parameters while the forward pass runs")
    overlap_p2p_comm: bool | None = option(
        None, "overlap pipeline messages with compute (default: only for the interleaved schedule)"
    )
    deallocate_pipeline_outputs: bool = option(False, "free a stage's output once it is sent")
    distributed_timeout_minutes: float = option(10.0, "minutes after which a waiting collective is an error")

    def validate(self) -> None:
        for key in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "expert_model_parallel_size", "expert_tensor_parallel_size",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise UsageError(f"--{key.replace('_', '-')} is {getattr(self, key)}; expected at least 1")
        if not 0.01 <= self.distributed_timeout_minutes <= _MINUTES_OF_A_YEAR:
            raise UsageError(
                f"--distributed-timeout-minutes is {self.distributed_timeout_minutes}; expected 0.01 to "
                f"{_MINUTES_OF_A_YEAR}, a year"
            )
        if self.virtual_pipeline_model_parallel_size is not None:
            if self.virtual_pipeline_model_parallel_size < 2 or self.pipeline_model_parallel_size < 2:
                raise UsageError(
                    f"--virtual-pipeline-model-parallel-size {self.virtual_pipeline_model_parallel_size}: expected at "
                    f"least 2, with --pipeline-model-parallel-size >= 2 (it is {self.pipeline_model_parallel_size})"
                )
            if self.overlap_p2p_comm is False and self.pipeline_model_parallel_size == 2:
                raise UsageError(
                    "interleaved stages with --pipeline-model-parallel-size 2 and batched messages give wrong losses "
                    "in megatron-core: its sends and receives between the same two ranks are mismatched. Leave "
                    "--overlap-p2p-comm unset or true"
                )
        if self.deallocate_pipeline_outputs and self.p2p_overlapped:
            raise UsageError(
                "--deallocate-pipeline-outputs with overlapped pipeline messages frees outputs that are still being "
                "sent (seen on gloo: wrong losses without an error); drop it"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UsageError("--sequence-parallel needs --tensor-model-parallel-size > 1; there is nothing to split")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UsageError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: without them no "
                "parameter is split over data-parallel ranks"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model, context parallelism included."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def interleaved(self) -> bool:
        """True if a pipeline stage has several model chunks."""
        return self.virtual_pipeline_model_parallel_size is not None

    @property
    def p2p_overlapped(self) -> bool:
        """True if pipeline messages overlap with compute."""
        return self.interleaved if self.overlap_p2p_comm is None else self.overlap_p2p_comm

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of copies of the model among ``world_size`` ranks.

        Raises:
            UsageError: the world is not a multiple of TP x PP x CP, or EP does not fit into it.
        """
        if world_size % self.model_parallel_size:
            raise UsageError(
                f"world size {world_size} is not a multiple of TP x PP x CP = {self.tensor_model_parallel_size} x "
                f"{self.pipeline_model_parallel_size} x {self.context_parallel_size} = {self.model_parallel_size}; "
                f"start torchrun with --nproc-per-node x --nnodes a multiple of {self.model_parallel_size}"
            )
        experts = self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        if world_size % experts:
            raise UsageError(
                f"world size {world_size} is not a multiple of expert TP x EP x PP = "
                f"{self.expert_tensor_parallel_size} x {self.expert_model_parallel_size} x "
                f"{self.pipeline_model_parallel_size} = {experts}"
            )
        return world_size // self.model_parallel_size


def world_size() -> int:
    """Number of ranks that torchrun, or another launcher, started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """True for rank 0 of the world, and for a process that no launcher started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Coordinates:
    """One rank's place in the grid; ranks count tensor first, then context, data, pipeline, as Megatron's do."""

    tensor: int
    context: int
    data: int
    pipeline: int


def rank_of(place: Coordinates, *, tensor: int, context: int, data: int) -> int:
    """Return the rank at ``place`` in a grid whose first three sizes are given."""
    return place.tensor + tensor * (place.context + context * (place.data + data * place.pipeline))


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding: the true vocabulary rounded up to a multiple of ``divisible_by`` x TP, as in Megatron."""
    multiple = divisible_by * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
