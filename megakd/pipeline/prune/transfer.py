"""Weights of a student from those of its teacher, both loaded in one layout: matrix by matrix, between the ranks.

Layers move between pipeline stages and heads, neurons and rows between tensor ranks, because the student's are fewer.
One whole matrix at a time is in memory, besides both models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.model.gpt import HiddenGPTModel, partition_dim
from megakd.model.initial_weights import global_name
from megakd.model.matrix_slices import join_slices, slice_matrix
from megakd.parallel import Groups


@torch.no_grad()
def fill_student_inplace(
    student: HiddenGPTModel,
    teacher: HiddenGPTModel,
    groups: Groups,
    *,
    source: Callable[[str], str],
    cut: Callable[[str, Tensor], Tensor],
) -> None:
    """Set every parameter of the student. All ranks of a copy call it.

    source: the teacher's name of a student's parameter. cut: makes the student's whole parameter, by its name, of the
    teacher's.
    """
    target, origin = _parameters(student, groups), _parameters(teacher, groups)
    ranks = dist.get_process_group_ranks(groups.collection.pp)
    target_stage, origin_stage = _stages_of(target, groups), _stages_of(origin, groups)
    for name in sorted(target_stage):  # one order on all ranks, so that messages meet
        giver, taker = origin_stage[source(name)], target_stage[name]
        if groups.pipeline_rank == giver:
            weight = origin[source(name)]
            whole = cut(name, _whole(weight, name, groups))
            part = slice_matrix(
                whole,
                name,
                rank=groups.tensor_rank,
                size=groups.parallel.tensor_model_parallel_size,
                rows=weight.shape[0],  # of a vocabulary, which student and teacher share
            )
            if taker == giver:
                target[name].copy_(part)
            else:
                dist.send(part.contiguous(), ranks[taker])
        elif groups.pipeline_rank == taker:
            part = torch.empty_like(target[name])
            dist.recv(part, ranks[giver])
            target[name].copy_(part)


def _parameters(model: HiddenGPTModel, groups: Groups) -> dict[str, Tensor]:
    """Parameters of this rank by their names in the whole model."""
    return {global_name(model, name, groups): weight.detach() for name, weight in model.named_parameters()}


def _stages_of(parameters: dict[str, Tensor], groups: Groups) -> dict[str, int]:
    """Stage of every parameter of the model, on all ranks. Tied weights have two names."""
    names: list[list[str]] = [[] for _ in range(groups.parallel.pipeline_model_parallel_size)]
    dist.all_gather_object(names, list(parameters), group=groups.collection.pp)
    return {name: stage for stage, of_stage in enumerate(names) for name in of_stage}


def _whole(weight: Tensor, name: str, groups: Groups) -> Tensor:
    size = groups.parallel.tensor_model_parallel_size
    if size == 1 or partition_dim(name) is None:
        return join_slices([weight], name)
    parts = [torch.empty_like(weight) for _ in range(size)]
    dist.all_gather(parts, weight.contiguous(), group=groups.tensor)
    return join_slices(parts, name)
