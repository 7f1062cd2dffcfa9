"""Which samples a gradient that is not finite comes from: the step is gone through again, a microbatch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from megakd.data.loader import StepBatch
from megakd.parallel import Groups
from megakd.teachers.protocol import Teacher
from megakd.train.objective.objective import Objective
from megakd.train.optim import NonFiniteGradientError, Student
from megakd.train.step import run_step

_NAMED = 8  # samples of a rank, at most


def name_samples(
    refusal: Exception,
    student: Student,
    batch: StepBatch,
    teacher: Teacher,
    objective: Objective,
    groups: Groups,
    *,
    step: int,
) -> Exception:
    """The ``refusal`` of a step with the samples in its words, where a gradient is what it is about; else as it is.

    All ranks call it, with the random numbers that the step began with. Gradients are looked at before they are added
    up over data-parallel ranks, so that each rank answers for its own samples; with experts on several ranks, also for
    those of others that its experts saw. The gradients are of no use afterwards.
    """
    if not isinstance(refusal, NonFiniteGradientError):
        return refusal
    parts = list(batch.parts(groups.parallel.pipeline_model_parallel_size if groups.parallel.interleaved else 1))
    bad = []
    with _unreduced(student):
        for part in parts:
            for chunk in student.wrapped:
                chunk.zero_grad_buffer()
            run_step(student, part, teacher, objective, groups, step=step)
            bad.append(not all(_is_finite(chunk) for chunk in student.wrapped))
    everyone: list[tuple[int, list[bool]]] = [(0, [])] * groups.world_size
    dist.all_gather_object(everyone, (groups.data_rank, bad))
    seen = {}
    for data_rank in range(groups.data_size):
        ranks = [rank for rank, (own, _) in enumerate(everyone) if own == data_rank]
        guilty = [part for index, part in enumerate(parts) if any(everyone[rank][1][index] for rank in ranks)]
        if names := [name for part in guilty for name in _names(part, data_rank)]:
            seen[next(rank for rank in ranks if any(everyone[rank][1]))] = names
    if not seen:  # each part is finite: what overflows is the sum
        rank_0 = [name for part in parts for name in _names(part, 0)]
        told = f"in the sum over the step's samples alone, of rank 0: {_listed(rank_0)}"
    else:
        told = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in seen.items())
    what, outcome = str(refusal).split("; ", 1)
    return type(refusal)(f"{what} ({told}); {outcome}")


@contextmanager
def _unreduced(student: Student) -> Iterator[None]:
    """Within, a backward pass leaves every rank with the gradients of its own microbatches."""
    config = student.chunks[0].config
    finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in student.wrapped:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


def _is_finite(chunk: torch.nn.Module) -> bool:
    buffers = chunk.buffers + chunk.expert_parallel_buffers  # type: ignore[operator]
    return all(bool(torch.isfinite(buffer.grad_data).all()) for buffer in buffers)


def _names(batch: StepBatch, data_rank: int) -> list[str]:
    microbatches = (batch.microbatch(index, data_rank) for index in range(batch.num_microbatches))
    return [
        f"dataset {dataset} sample {sample}"
        for microbatch in microbatches
        for dataset, sample in zip(microbatch.dataset_ids_B.tolist(), microbatch.sample_ids_B.tolist())
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
