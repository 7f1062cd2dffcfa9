"""Importance of a running teacher's parts, from the activations inside its layers.

Minitron (arXiv 2407.14679, section 2.2) ranks parts by their activations on a calibration set:

- a query head i by ``|| Attn(X W_Q,i, X W_K,i, X W_V,i) ||_2``, the norm of its output at a position,
- a feed-forward neuron i by what enters the second projection,
- a channel i of the residual stream by ``LN(X)_i``, what leaves the norms,

each aggregated over the sequence, by default the mean of absolute values, then over samples, by default the root of
the sum of squares. The norms of all layers count alike in a channel: their importances are added. A layer's influence
is ``1 - E[cos(X_in, X_out)]`` over positions (ShortGPT, arXiv 2403.03853, equation 1).

Axes: ``S`` sequence, ``B`` microbatch, ``U`` units of this rank, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.pipeline.prune.artefact import Importance
from megakd.pipeline.prune.config import Aggregation


class Observer:
    """Sums over what passes through this rank's layers, inside a ``with``; then `importance`, over all ranks.

    megatron's layers return nothing but their output, so forward hooks of torch look at their inputs.
    """

    def __init__(
        self, model: HiddenGPTModel, shape: ModelShape, groups: Groups, *, sequence: Aggregation, samples: Aggregation
    ) -> None:
        self._model, self._groups = model, groups
        self._sequence, self._over_samples = sequence, samples
        self._masks: list[Tensor] = []
        self._place = -1
        layers, device = shape.num_layers, groups.device
        self._cosines_L2 = torch.zeros(layers, 2, dtype=torch.float64, device=device)  # sum, number of positions
        self._heads_LA = torch.zeros(layers, shape.num_attention_heads, dtype=torch.float64, device=device)
        self._neurons_LF = torch.zeros(layers, shape.ffn_hidden_size, dtype=torch.float64, device=device)
        self._norms_L2H = torch.zeros(layers, 2, shape.hidden_size, dtype=torch.float64, device=device)
        self._width = shape.kv_channels
        self._handles: list[Any] = []

    def expect(self, masks_SB: list[Tensor]) -> None:
        """Give the positions that count, bool ``[S, B]``, of the microbatches that come next, in their order."""
        self._masks, self._place = [mask.to(self._groups.device) for mask in masks_SB], -1

    def __enter__(self) -> Observer:
        self._handles = [self._model.register_forward_pre_hook(lambda *_: self._next_microbatch())]
        for layer in self._model.decoder.layers:
            number = layer.layer_number - 1
            attention, mlp = layer.self_attention, layer.mlp
            self._handles += [
                layer.register_forward_hook(self._sees_layer(number), with_kwargs=True),
                attention.linear_proj.register_forward_pre_hook(self._sees_heads(number)),
                mlp.linear_fc2.register_forward_pre_hook(self._sees_neurons(number)),
                layer.input_layernorm.register_forward_hook(self._sees_norm(number, 0)),
                layer.pre_mlp_layernorm.register_forward_hook(self._sees_norm(number, 1)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def importance(self, *, num_samples: int, loss: float) -> Importance:
        """Add up what all ranks have seen; every rank calls it and returns the whole."""
        tensor_rank = self._groups.tensor_rank
        if tensor_rank > 0:  # every rank of a layer has the norms' outputs whole
            self._norms_L2H.zero_()
            if not self._groups.parallel.sequence_parallel:
                self._cosines_L2.zero_()
        for sums in (self._cosines_L2, self._heads_LA, self._neurons_LF, self._norms_L2H):
            dist.all_reduce(sums)
        cosines_L2 = self._cosines_L2.cpu().numpy()

        def over_samples(sums: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
            values: np.ndarray[Any, np.dtype[np.float64]] = sums.cpu().numpy()
            return np.sqrt(values) if self._over_samples == "l2" else values / num_samples

        return Importance(
            layers_L=1.0 - cosines_L2[:, 0] / cosines_L2[:, 1],
            heads_LA=over_samples(self._heads_LA),
            neurons_LF=over_samples(self._neurons_LF),
            channels_H=over_samples(self._norms_L2H).sum((0, 1)),
            loss=loss,
        )

    def _next_microbatch(self) -> None:
        self._place += 1

    def _sees_layer(self, number: int) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            entering_SBH = (named["hidden_states"] if "hidden_states" in named else inputs[0]).detach().float()
            leaving_SBH = (output[0] if isinstance(output, tuple) else output).detach().float()
            mask_SB = self._mask(split=self._groups.parallel.sequence_parallel)
            cosine_SB = F.cosine_similarity(entering_SBH, leaving_SBH, dim=-1)
            self._cosines_L2[number, 0] += cosine_SB[mask_SB].double().sum()
            self._cosines_L2[number, 1] += mask_SB.sum()

        return see

    def _sees_heads(self, number: int) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...]) -> None:
            heads_SBUD = inputs[0].detach().float().unflatten(-1, (-1, self._width))
            self._add(self._heads_LA[number], heads_SBUD.norm(dim=-1))

        return see

    def _sees_neurons(self, number: int) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...]) -> None:
            self._add(self._neurons_LF[number], inputs[0].detach().float())

        return see

    def _sees_norm(self, number: int, norm: int) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            sums_BU, count_B = self._over_sequence(
                output.detach().float(), split=self._groups.parallel.sequence_parallel
            )
            self._norms_L2H[number, norm] += self._over_batch(sums_BU, count_B)

        return see

    def _add(self, sums_U: Tensor, values_SBU: Tensor) -> None:
        """Add values of units that are split over tensor ranks: this rank's are a slice of the whole."""
        width, rank = values_SBU.shape[-1], self._groups.tensor_rank
        sums_U[rank * width : (rank + 1) * width] += self._over_batch(*self._over_sequence(values_SBU, split=False))

    def _over_sequence(self, values_SBU: Tensor, *, split: bool) -> tuple[Tensor, Tensor]:
        """Sums over the positions that count, ``[B, U]``, and their number, ``[B]``.

        split: the sequence is divided over tensor ranks; the sums are over all of them.
        """
        mask_SB = self._mask(split=split)
        values_SBU = values_SBU.abs() if self._sequence == "mean" else values_SBU.square()
        sums_BU = torch.einsum("sbu,sb->bu", values_SBU, mask_SB.float())
        if split:
            dist.all_reduce(sums_BU, group=self._groups.tensor)
        return sums_BU, self._mask(split=False).sum(0)

    def _over_batch(self, sums_BU: Tensor, count_B: Tensor) -> Tensor:
        """Sum over the samples, ``[U]`` float64, of their aggregated values, or of the squares of these."""
        sums_BU = sums_BU.double()
        if self._sequence == "mean":
            values_BU = sums_BU / count_B.clamp(min=1)[:, None]
            return (values_BU.square() if self._over_samples == "l2" else values_BU).sum(0)
        return (sums_BU if self._over_samples == "l2" else sums_BU.sqrt()).sum(0)

    def _mask(self, *, split: bool) -> Tensor:
        mask_SB = self._masks[self._place]
        return (
            mask_SB.chunk(self._groups.parallel.tensor_model_parallel_size)[self._groups.tensor_rank]
            if split
            else (mask_SB)
        )
