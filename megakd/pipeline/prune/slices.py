"""Cut of a teacher's parameter down to the parts that a student keeps; whole tensors, one process.

Axes as in `choice`; ``D`` width of a head, ``X`` the teacher's hidden size or nothing, for a weight or a bias.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.pipeline.prune.choice import Choice


def source_name(name: str, choice: Choice) -> str:
    """Return the teacher's name of the student's parameter ``name``: layers are numbered anew."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(choice.layers_L[int(parts[2])])
    return ".".join(parts)


def cut_parameter(name: str, whole: Tensor, choice: Choice, teacher: ModelShape, *, rescale_norms: bool) -> Tensor:
    """Return the student's parameter ``name`` from the teacher's, as megatron-core lays them out.

    rescale_norms: RMSNorm divides by the root of the mean square over all channels (arXiv 1910.07467, equation 4). If
    the channels that go are 0, the mean over those that stay is larger by the ratio of the sizes, so their weights are
    multiplied by its root, ``sqrt(teacher's hidden size / student's)``; the epsilon keeps its value.
    """
    parts = name.split(".")
    layer = int(parts[2]) if parts[:2] == ["decoder", "layers"] else None
    channels_H = torch.from_numpy(choice.channels_H).to(whole.device)
    if layer is None:
        if name.endswith("final_layernorm.weight"):
            return _norm(whole, channels_H, rescale_norms)
        return whole[:, channels_H]  # embedding and output weight
    if "q_layernorm" in name or "k_layernorm" in name:
        return whole  # over the channels of a head, which all stay
    if "layernorm" in name:
        return _norm(whole, channels_H, rescale_norms)
    if "linear_qkv" in name:
        return _qkv(whole, choice.groups_LG[layer], choice.heads_LA[layer], channels_H, teacher)
    if "linear_proj" in name:
        columns = torch.from_numpy(_spread(choice.heads_LA[layer], teacher.kv_channels)).to(whole.device)
        return whole[channels_H][:, columns]
    neurons_F = torch.from_numpy(choice.neurons_LF[layer]).to(whole.device)
    if "linear_fc1" in name:  # gate above up
        gate, up = whole.chunk(2)
        return torch.cat([gate[neurons_F], up[neurons_F]])[:, channels_H]
    assert "linear_fc2" in name, name
    return whole[channels_H][:, neurons_F]


def _norm(weight_H: Tensor, channels_H: Tensor, rescale: bool) -> Tensor:
    kept_H = weight_H[channels_H]
    ratio = len(weight_H) / len(channels_H)
    return (kept_H.float() * math.sqrt(ratio)).to(kept_H.dtype) if rescale and ratio > 1 else kept_H


def _qkv(
    whole: Tensor, groups_G: NDArray[np.int64], heads_A: NDArray[np.int64], channels_H: Tensor, teacher: ModelShape
) -> Tensor:
    """Keep query heads with their key/value heads. Each key/value head's rows are: its query heads, key, value."""
    shared = teacher.num_attention_heads // teacher.num_query_groups
    blocks = whole.view(teacher.num_query_groups, shared + 2, teacher.kv_channels, *whole.shape[1:])
    pieces = []
    for number, heads in zip(groups_G.tolist(), heads_A.reshape(len(groups_G), -1) % shared):
        pieces.append(blocks[number][torch.from_numpy(heads).to(whole.device)].flatten(0, 1))
        pieces.append(blocks[number][shared:].flatten(0, 1))
    kept = torch.cat(pieces)
    return kept[:, channels_H] if kept.dim() > 1 else kept


def _spread(heads_A: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Columns of heads: ``width`` for each."""
    return (heads_A[:, None] * width + np.arange(width)).reshape(-1)
