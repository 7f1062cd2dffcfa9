"""A teacher that is a frozen model: its hidden states for the microbatches of a step, in a layout of its own.

Axes: B microbatch, S sequence, H hidden of the teacher, T = S x B tokens in megatron's order (sequence first).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.layout import Coordinates, rank_of
from megakd.model.attention import slice_sequence
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.targets import DenseTargets
from megakd.teachers.protocol import Batch

# isort: split
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


class ModelTeacher:
    """A frozen model beside the student, in a layout of its own.

    If both have one pipeline stage and the same layout, it runs inside the student's forward step. Otherwise it runs
    its own forward-only schedule over the microbatches of the whole step first, and sends its hidden states to the
    student's last stage; the student's schedule is unchanged.

    chunks: the teacher without its head. head_weight_vH: the head's rows for the *student's* slice of the vocabulary,
    on ranks of the student's last stage; None elsewhere. groups: the teacher's. student: the student's groups.
    """

    def __init__(
        self, chunks: list[HiddenGPTModel], head_weight_vH: Tensor | None, groups: Groups, student: Groups
    ) -> None:
        (self._model,) = chunks
        self._model.eval().requires_grad_(False)
        self._head_weight_vH = head_weight_vH
        self._groups = groups
        self._student = student
        same_groups = groups.collection is student.collection
        self._inline = same_groups and groups.parallel.pipeline_model_parallel_size == 1

    def targets(self, batch: Batch, needed: NDArray[np.bool_] | None = None) -> Iterator[DenseTargets | None]:
        """Yield the targets of this rank's microbatches in order; None for those that are not needed.

        needed: bool ``[microbatches of the step, of all data-parallel ranks]``, the same on every rank; all by default.
            The others are not computed. (Experts make data-parallel ranks run together: there a microbatch is computed
            if that of any rank is needed.)
        """
        every = batch.num_microbatches
        flags = np.ones(every * self._student.data_size, np.bool_) if needed is None else needed
        if self._student.parallel.expert_model_parallel_size > 1:
            flags = np.repeat(flags.reshape(every, -1).any(1), self._student.data_size)
        if self._inline:
            is_needed = flags.reshape(every, -1)[:, self._student.data_rank].tolist()
            return (self._targets(self._hidden(batch.microbatch(i))) if is_needed[i] else None for i in range(every))
        hidden = self._run_step(batch, np.flatnonzero(flags).tolist())
        if not self._student.is_last_stage:
            return iter(())
        return iter([self._targets(hidden[i]) if i in hidden else None for i in range(every)])

    def _targets(self, hidden_SBH: Tensor) -> DenseTargets:
        assert self._head_weight_vH is not None
        return DenseTargets(hidden_SBH.reshape(-1, hidden_SBH.shape[-1]), self._head_weight_vH)

    @torch.no_grad()
    def _hidden(self, microbatch: Any) -> Tensor:
        """Final hidden states ``[S, B, H]`` of one microbatch, the whole sequence (this rank's context part)."""
        return self._whole_sequence(self._model(self._tokens(microbatch), None, None))

    def _tokens(self, microbatch: Any) -> Tensor:
        whole_BS = torch.from_numpy(microbatch.tokens_BS).to(self._groups.device, non_blocking=True)
        size = self._groups.parallel.context_parallel_size
        return slice_sequence(whole_BS, dim=1, rank=self._groups.context_rank, size=size)

    def _whole_sequence(self, hidden_SBH: Tensor) -> Tensor:
        if self._groups.parallel.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self._groups.tensor
            )
        return hidden_SBH

    @torch.no_grad()
    def _run_step(self, batch: Batch, numbers: list[int]) -> dict[int, Tensor]:
        """Hidden states of this rank's microbatches by index, on the student's last stage; empty elsewhere.

        numbers: the microbatches of the step that are needed; the teacher's ranks take them in turn.
        """
        student_data = self._student.data_size
        mine = numbers[self._groups.data_rank :: self._groups.data_size]
        microbatches = [batch.microbatch(number // student_data, number % student_data) for number in mine]
        if self._groups.parallel.pipeline_model_parallel_size == 1:
            hidden = [self._hidden(microbatch) for microbatch in microbatches]
        else:
            hidden = self._run_pipeline(microbatches)
        tokens_BS = batch.microbatch(0).tokens_BS
        context = self._groups.parallel.context_parallel_size
        shape = (tokens_BS.shape[1] // context, tokens_BS.shape[0], self._model.config.hidden_size)
        return self._redistribute(dict(zip(mine, hidden)), numbers, shape)

    def _run_pipeline(self, microbatches: list[Any]) -> list[Tensor]:
        """Run megatron's forward-only schedule in the teacher's groups; results on its last stage, empty elsewhere."""
        if not microbatches:
            return []

        def forward_step(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            def keep(hidden_SBH: Tensor, non_loss_data: bool = True) -> Tensor:
                return self._whole_sequence(hidden_SBH)

            return model(self._tokens(next(iterator)), None, None), keep

        config = self._model.config
        hidden: list[Tensor] = forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=self._model,
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].tokens_BS.shape[1],
            micro_batch_size=microbatches[0].tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(self._groups.collection.pp, config),
            pg_collection=self._groups.collection,
        )
        return hidden if self._groups.is_last_stage else []

    def _redistribute(self, hidden: dict[int, Tensor], numbers: list[int], shape: tuple[int, ...]) -> dict[int, Tensor]:
        """Send each microbatch's hidden states from the teacher's last stage to the student's.

        Both sides walk the same list of (microbatch, source, destination) in one order, so that messages between two
        ranks match.
        """
        received: dict[int, Tensor] = {}
        operations, rank = [], self._student.rank
        for number, source, destination in self._routes(numbers):
            index = number // self._student.data_size
            if source == destination == rank:
                received[index] = hidden[number]
            elif source == rank:
                operations.append(dist.P2POp(dist.isend, hidden[number].contiguous(), destination, tag=number))
            elif destination == rank:
                dtype = self._model.config.params_dtype
                received[index] = torch.empty(shape, dtype=dtype, device=self._groups.device)
                operations.append(dist.P2POp(dist.irecv, received[index], source, tag=number))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return received

    def _routes(self, numbers: list[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (microbatch of the step, teacher rank that made it, student rank that needs it)."""
        teacher, student = _sizes(self._groups), _sizes(self._student)
        last_teacher = self._groups.parallel.pipeline_model_parallel_size - 1
        last_student = self._student.parallel.pipeline_model_parallel_size - 1
        for turn, number in enumerate(numbers):
            for context in range(student["context"]):
                for tensor in range(student["tensor"]):
                    place = Coordinates(tensor % teacher["tensor"], context, turn % teacher["data"], last_teacher)
                    need = Coordinates(tensor, context, number % student["data"], last_student)
                    yield number, rank_of(place, **teacher), rank_of(need, **student)


def _sizes(groups: Groups) -> dict[str, int]:
    return {
        "tensor": groups.parallel.tensor_model_parallel_size,
        "context": groups.parallel.context_parallel_size,
        "data": groups.data_size,
    }
