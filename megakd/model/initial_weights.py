"""Initial weights that depend on the seed and a weight's name alone, never on the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.model.gpt import HiddenGPTModel, partition_dim
from megakd.model.matrix_slices import slice_matrix
from megakd.parallel import Groups


@torch.no_grad()
def set_initial_weights(
    models: list[HiddenGPTModel], shape: ModelShape, groups: Groups, *, vocab_size: int, seed: int
) -> None:
    """Fill every weight from ``seed`` and its name alone, so that a seed gives the same model in every layout.

    Norms are 1, biases 0, matrices normal with ``init_method_std``; the two that write to the residual stream with
    ``init_method_std / sqrt(2 * num_layers)``. Padded vocabulary rows are 0. Each rank draws the whole matrix on CPU
    and keeps its slice.
    """
    tensor_size = groups.parallel.tensor_model_parallel_size
    for model in models:
        for name, weight in model.named_parameters():
            key = global_name(model, name, groups)
            if weight.dim() == 1:
                weight.fill_(0.0 if key.endswith("bias") else 1.0)
                continue
            experts = ".experts." in key
            size = groups.parallel.expert_tensor_parallel_size if experts else tensor_size
            whole = _draw_matrix(key, weight, shape, size, vocab_size, seed)
            rank = groups.collection.expt_tp.rank() if experts else groups.tensor_rank
            weight.copy_(slice_matrix(whole, key, rank=rank, size=size, rows=weight.shape[0]))


def global_name(model: HiddenGPTModel, name: str, groups: Groups) -> str:
    """Return a parameter's name in the whole model, where layers and experts are not counted from this rank's first."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts:
        place = parts.index("local_experts") + 1
        layer = model.decoder.layers[int(name.split(".")[2])]
        parts[place] = str(layer.mlp.local_expert_indices[int(parts[place])])
    return ".".join(parts)


def _draw_matrix(key: str, weight: Tensor, shape: ModelShape, size: int, vocab_size: int, seed: int) -> Tensor:
    whole = list(weight.shape)
    dim = partition_dim(key)
    if dim is not None:
        whole[dim] *= size
    if "word_embeddings" in key or "output_layer" in key:
        whole[0] = vocab_size
    name = "output" if shape.tied and ("word_embeddings" in key or "output_layer" in key) else key
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
    )
    std = shape.init_method_std
    if "linear_proj" in key or "linear_fc2" in key:
        std /= math.sqrt(2.0 * shape.num_layers)
    return torch.randn(whole, generator=generator, dtype=torch.float32).mul_(std)
