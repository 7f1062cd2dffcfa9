"""Core attention by torch's scaled_dot_product_attention, with context parallelism, for megatron's local layers.

megatron-core's own local attention materialises the ``[S, S]`` scores (2.5 times slower at S = 2,048 on a CPU) and
refuses context parallelism. Axes: S sequence (this rank's part of it), B microbatch, N query heads, G key/value heads,
D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import megakd.parallel  # noqa: F401  (before any megatron import)

# isort: split
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention over whole sequences; takes the place of ``DotProductAttention`` in a layer spec."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the attention ``[S, B, N * D]``; ``attention_mask`` is not read.

        The mask is causal, unless megatron asks for none: a token that is read after others, whose keys and values it
        has kept, sees all of them.
        """
        assert attention_bias is None and packed_seq_params is None
        size, rank = self.context_group.size(), self.context_group.rank()
        if size > 1:
            key_SBGD = gather_sequence(key_SBGD, self.context_group)
            value_SBGD = gather_sequence(value_SBGD, self.context_group)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        dropout = self.dropout if self.training else 0.0
        grouped = query.shape[1] != key.shape[1]
        causal = attn_mask_type is not AttnMaskType.no_mask
        if size == 1:
            out = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=causal, scale=self.scale, enable_gqa=grouped
            )
        else:
            chunk = query.shape[2] // 2
            attend = _ATTEND_TO_EARLIER.get(query.device.type, attend_with_mask)
            parts = []
            for half, number in enumerate((rank, 2 * size - 1 - rank)):
                stop = (number + 1) * chunk  # this chunk sees the keys up to its own end
                part = query[:, :, half * chunk : (half + 1) * chunk]
                parts.append(attend(part, key[:, :, :stop], value[:, :, :stop], dropout=dropout, scale=self.scale))
            out = torch.cat(parts, dim=2)
        return out.permute(2, 0, 1, 3).flatten(2)


def attend_with_mask(
    query_BNCD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, dropout: float, scale: float
) -> Tensor:
    """Return the causal attention ``[B, N, C, D]`` of the last C tokens of a sequence of S, by a mask ``[C, S]``."""
    chunk, stop = query_BNCD.shape[2], key_BGSD.shape[2]
    return F.scaled_dot_product_attention(
        query_BNCD,
        key_BGSD,
        value_BGSD,
        attn_mask=torch.ones(chunk, stop, dtype=torch.bool, device=query_BNCD.device).tril(stop - chunk),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query_BNCD.shape[1] != key_BGSD.shape[1],
    )


def attend_by_alignment(
    query_BNCD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, dropout: float, scale: float
) -> Tensor:
    """Return the result of `attend_with_mask` from CUDA's kernels that never make the scores ``[C, S]``.

    They take no mask of values, but know this one by name: causal, aligned to the last token. Key heads are copied,
    because only one of those kernels takes fewer of them, and torch falls back to whole scores without a word.
    """
    copies = query_BNCD.shape[1] // key_BGSD.shape[1]
    if copies > 1:
        key_BGSD, value_BGSD = (heads.repeat_interleave(copies, dim=1) for heads in (key_BGSD, value_BGSD))
    aligned: Any = causal_lower_right(query_BNCD.shape[2], key_BGSD.shape[2])
    return F.scaled_dot_product_attention(
        query_BNCD, key_BGSD, value_BGSD, attn_mask=aligned, dropout_p=dropout, scale=scale
    )


_ATTEND_TO_EARLIER = {"cpu": attend_with_mask, "cuda": attend_by_alignment}
"""Attention of a part of a sequence to all that comes before it, by the kind of device."""


def gather_sequence(part_S: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join the parts of a sequence that ranks hold in zigzag order, along dim 0. Differentiable."""
    gathered: Tensor = _GatherSequence.apply(part_S, group)  # type: ignore[no-untyped-call]
    return gathered


def slice_sequence(whole: Tensor, *, dim: int, rank: int, size: int) -> Tensor:
    """Return this rank's part of a sequence: chunks ``rank`` and ``2 * size - 1 - rank`` of ``2 * size``.

    This spreads causal work evenly over ranks. The order is megatron's (``rope_utils.get_pos_emb_on_this_cp_rank``).
    """
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim).contiguous()


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        size = group.size()
        parts = torch.empty(size, *part.shape, dtype=part.dtype, device=part.device)
        dist.all_gather_into_tensor(parts.view(-1), part.contiguous().view(-1), group=group)
        halves = parts.view(size, 2, part.shape[0] // 2, *part.shape[1:])
        return torch.cat([halves[:, 0].flatten(0, 1), halves[:, 1].flip(0).flatten(0, 1)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = grads[0].view(2, size, -1, *grads[0].shape[1:])
        parts = torch.stack([chunks[0], chunks[1].flip(0)], dim=1).contiguous()  # [rank, half, ...]
        out = torch.empty(parts[0].numel(), dtype=parts.dtype, device=parts.device)
        dist.reduce_scatter_tensor(out, parts.view(-1), group=ctx.group)
        return out.view(-1, *grads[0].shape[1:]), None
