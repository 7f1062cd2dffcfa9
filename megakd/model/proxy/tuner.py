"""Tuning of a model with a value head: every rank holds all of it and sees other samples; AdamW in fp32.

Axes: S sequence, B microbatch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.model.gpt import HiddenGPTModel
from megakd.model.proxy.head import ValueHead
from megakd.parallel import Groups

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor


class ValueTuner:
    """Model, value head and AdamW, with gradients summed over the data-parallel ranks.

    To ``CheckpointWriter`` and ``load_training_state`` the tuner is the optimizer: besides the model's weights a
    checkpoint has the head and AdamW's moments, under keys that begin with ``proxy``.

    model: whole, in fp32. Its output weight is not trained, unless it is the embedding.
    """

    def __init__(
        self, model: HiddenGPTModel, head: ValueHead, groups: Groups, *, weight_decay: float, clip_grad: float
    ) -> None:
        self.model, self.head, self._groups, self._clip_grad = model, head, groups, clip_grad
        if model.output_layer.weight is not None:  # None: tied to the embedding
            model.output_layer.requires_grad_(False)
        self._named: dict[str, Tensor] = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        self._named |= {f"head.{name}": p for name, p in head.named_parameters()}
        matrices = [p for p in self._named.values() if p.dim() > 1]
        others = [p for p in self._named.values() if p.dim() <= 1]
        decays = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(decays, betas=(0.9, 0.95), eps=1e-8)
        self._num_steps = torch.zeros(1, dtype=torch.float32)
        for parameter in self._named.values():
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self._adam.state[parameter] = {"step": self._num_steps[0].clone(), **moments}

    def values(self, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """``[B]`` fp32: value of each sample, from the hidden states where ``mask_BS`` is true."""
        hidden_SBH: Tensor = self.model(tokens_BS, None, None)
        value_B: Tensor = self.head(hidden_SBH, mask_BS)
        return value_B

    def step(self, lr: float) -> float:
        """Sum the gradients over all ranks, clip them by their norm, and apply them. All ranks call it.

        Returns the norm before clipping; nothing is applied if it is not finite.
        """
        parameters = list(self._named.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        dist.all_reduce(flat, group=self._groups.collection.dp)
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if norm < float("inf"):  # also false for NaN
            flat.mul_(min(1.0, self._clip_grad / (norm + 1e-6)))
            for parameter, piece in zip(parameters, torch.split(flat, [p.numel() for p in parameters])):
                parameter.grad = piece.view_as(parameter)
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self._num_steps += 1
        self._adam.zero_grad(set_to_none=True)
        return norm

    def sharded_state_dict(self, _model: Any, *, is_loading: bool, metadata: Any) -> dict[str, ShardedTensor]:
        """Head, moments and number of steps, for megatron's checkpoints: equal on all ranks, written by rank 0."""
        rank = self._groups.data_rank
        return {
            key: ShardedTensor.from_rank_offsets(f"proxy.{key}", tensor, replica_id=(0, 0, rank))
            for key, tensor in self._state().items()
        }

    def load_state_dict(self, loaded: dict[str, Tensor]) -> None:
        """Copy loaded tensors into head, moments and number of steps, in place."""
        with torch.no_grad():
            for key, tensor in self._state().items():
                tensor.copy_(loaded[key])
        for parameter in self._named.values():
            self._adam.state[parameter]["step"].copy_(self._num_steps[0])

    def _state(self) -> dict[str, Tensor]:
        state = {f"head.{name}": parameter.data for name, parameter in self.head.named_parameters()}
        state["num_steps"] = self._num_steps
        for name, parameter in self._named.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self._adam.state[parameter][moment]
        return state
