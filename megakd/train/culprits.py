"""Search for the samples whose gradients are not finite: the step is computed again, one microbatch at a time."""

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
    """Return the ``refusal`` of a step; if it is about a gradient, with the guilty samples in its message.

    All ranks call it, with the random numbers that the step began with. Gradients are examined before they are added up
    over data-parallel ranks, so that each rank sees those of its own samples; with experts on several ranks, also those
    of other ranks' samples that its experts computed. The gradients must not be used afterwards.

    teacher, objective: of the step, as `run_step` had them.
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
        ranks = [rank for rank, (part_of, _) in enumerate(everyone) if part_of == data_rank]
        guilty = [part for index, part in enumerate(parts) if any(everyone[rank][1][index] for rank in ranks)]
        if names := [name for part in guilty for name in _names(part, data_rank)]:
            seen[next(rank for rank in ranks if any(everyone[rank][1]))] = names
    if not seen:  # each part is finite: the sum overflows
        rank_0 = [name for part in parts for name in _names(part, 0)]
        where = f"in the sum over the step's samples alone, of rank 0: {_listed(rank_0)}"
    else:
        where = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in seen.items())
    what, outcome = str(refusal).split("; ", 1)
    return type(refusal)(f"{what} ({where}); {outcome}")


@contextmanager
def _unreduced(student: Student) -> Iterator[None]:
    """Keep backward passes inside the block from reducing: every rank has the gradients of its own microbatches."""
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
