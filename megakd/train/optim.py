"""Student ready to train, and its updates: megatron's data parallelism and optimizer; no non-finite step is applied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from megakd.errors import NonFiniteError
from megakd.layout import ParallelConfig
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.train.config import OptimConfig
from megakd.train.fused_adam import use_where_fused_adam_is_missing
from megakd.train.lengths import Lengths
from megakd.train.lr_schedule import build_lr_schedule, set_rate

# isort: split
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer


class NonFiniteGradientError(NonFiniteError):
    """A gradient is not finite although every loss was; the samples that it comes from are not known yet."""


@dataclass(frozen=True)
class Student:
    """The model in training: the bare chunks, and the same chunks inside megatron's data parallelism.

    Between steps, read weights from ``whole()``, never from ``chunks``.
    """

    chunks: list[HiddenGPTModel]
    wrapped: list[DistributedDataParallel]

    def whole(self) -> list[HiddenGPTModel]:
        """Return the bare chunks with every weight as the last update left it. All ranks call it.

        With overlapped gathering an update changes only this rank's part of the weights; the other parts arrive during
        the forward pass of the next step. This gathers them now, so that the next forward pass need not.
        """
        for model in self.wrapped:
            if model.ddp_config.overlap_param_gather:
                # the forward pass waits for the same, layer by layer; unlike start_param_sync(force_sync=True) it
                # also makes the second copy that FP8 weights have
                for group in reversed(model.bucket_groups + model.expert_parallel_bucket_groups):
                    group.finish_param_sync(skip_next_bucket_dispatch=True)
        return self.chunks

    def output_weight(self, chunk: Any) -> torch.Tensor:
        """Return the head's shard ``[v, H]`` of a chunk that ends the model, after its gathering is finished."""
        weight = chunk.module.output_weight()
        if chunk.ddp_config.overlap_param_gather:
            # the output layer's own forward, whose hook would wait, never runs
            chunk.param_to_bucket_group[weight].finish_param_sync()
        return weight  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Update:
    """Gradient norm and learning rate of one optimizer step."""

    grad_norm: float
    lr: float


def wrap_student(chunks: list[HiddenGPTModel], parallel: ParallelConfig, groups: Groups) -> Student:
    """Put the chunks into megatron's data parallelism; gradients are summed in fp32 over ranks and microbatches."""
    config = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            chunk,
            disable_bucketing=index > 0,
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        _fuse_gradient_accumulation_inplace(chunk)
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        syncs = [model.no_sync for model in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return Student(chunks, wrapped)


def _fuse_gradient_accumulation_inplace(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add the gradients of their weights to megatron's fp32 buffers themselves.

    Else each writes its gradient in bf16, which a hook adds to the buffer in a second pass. The layers read the flag in
    each forward pass, and need the buffers from then on, so that it is set when data parallelism has made them. Other
    layers have no such flag.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


class Optimizer:
    """megatron's optimizer with the learning-rate schedule: one call per step.

    lengths: phases of the learning rate; if they are in samples, the schedule counts samples.
    """

    def __init__(
        self,
        optim: OptimConfig,
        student: Student,
        *,
        train_iters: int,
        lengths: Lengths | None = None,
    ) -> None:
        use_where_fused_adam_is_missing()
        config = student.chunks[0].config
        self._clip = optim.clip_grad
        self._student = student
        self.inner: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                decoupled_lr=optim.decoupled_lr,
                decoupled_min_lr=optim.decoupled_min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.adam_beta1,
                adam_beta2=optim.adam_beta2,
                adam_eps=optim.adam_eps,
                clip_grad=optim.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=student.wrapped[0].ddp_config.use_distributed_optimizer,
                overlap_param_gather=student.wrapped[0].ddp_config.overlap_param_gather,
            ),
            student.wrapped,
        )
        self.schedule = build_lr_schedule(optim, self.inner, train_iters=train_iters, lengths=lengths)
        self._counts_samples = lengths is not None and lengths.unit == "samples"

    def zero_grad(self) -> None:
        """Set the gradients and their buffers to 0."""
        for chunk in self._student.wrapped:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def give_weights(self) -> None:
        """Set the student's weights to the optimizer's own, rounded to their dtype, after a checkpoint was loaded.

        The two differ only in checkpoints of older versions, which saved before overlapped gathering was finished: half
        of their weights are one update old, and the optimizer's are right.
        """
        for part in self.inner.chained_optimizers:
            if isinstance(part, MixedPrecisionOptimizer):
                part._copy_main_params_to_model_params()
        for model in self._student.wrapped:
            if model.ddp_config.use_distributed_optimizer and not model.ddp_config.overlap_param_gather:
                model.start_param_sync()
        self._student.whole()

    def step(self, step: int, samples_before: int = 0) -> Update:
        """Clip by the global norm and apply, at the learning rate of ``step`` (the first is 1).

        samples_before: samples of all steps before this one; a schedule in samples counts them.

        Raises:
            NonFiniteGradientError: on every rank, if any gradient is not finite; nothing was applied.
        """
        lr = set_rate(self.schedule, samples_before if self._counts_samples else step - 1)
        if self.inner.prepare_grads():
            raise NonFiniteGradientError(f"step {step}: a gradient is not finite; the step was not applied")
        grad_norm = float(self.inner.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise NonFiniteGradientError(f"step {step}: the gradient norm is {grad_norm}; the step was not applied")
        if self._clip > 0:
            for part in self.inner.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=self._clip, total_norm=grad_norm)
        self.inner.step_with_ready_grads()
        return Update(grad_norm, lr)
