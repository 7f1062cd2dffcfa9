"""Frequencies of rotary positions: plain, linear, Llama 3.1's and YaRN's, computed as transformers computes them.

megatron-core knows Llama 3.1's scaling with three of its four numbers fixed, and YaRN without a factor of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.parallel import Groups

# isort: split
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


class ScaledRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """megatron's rotary embedding with the frequencies of a shape."""

    def __init__(self, shape: ModelShape, groups: Groups) -> None:
        super().__init__(
            kv_channels=shape.kv_channels,
            rotary_percent=shape.rotary_percent,
            rotary_base=shape.rotary_base,
            use_cpu_initialization=groups.device.type == "cpu",
            cp_group=groups.collection.cp,
        )
        self.inv_freq = inverse_frequencies(shape).to(groups.device)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Return ``[rotated / 2]`` float32: radians by which each pair of a head turns from one position to the next.

    Linear scaling divides all of them; Llama 3.1's the long wavelengths alone; YaRN (arXiv 2309.00071, section 3.2)
    those that turn less than ``yarn_beta_slow`` times in the old length, and in part those below ``yarn_beta_fast``.
    """
    rotated = int(shape.kv_channels * shape.rotary_percent)
    powers = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    plain = 1.0 / (shape.rotary_base**powers)
    if shape.rotary_seq_len_interpolation_factor is not None:
        return plain / shape.rotary_seq_len_interpolation_factor
    if shape.rope_scaling_factor is not None:
        return _llama3(plain, shape, shape.rope_scaling_factor)
    if shape.yarn_rotary_scaling_factor is not None:
        return _yarn(plain, shape, shape.yarn_rotary_scaling_factor)
    return plain


def softmax_scale(shape: ModelShape) -> float | None:
    """Return the factor of attention scores; None for the usual ``1 / sqrt(kv_channels)``.

    YaRN multiplies rotated queries and keys by a factor; where the whole head is rotated, that is its square times the
    scores.
    """
    if shape.yarn_rotary_scaling_factor is None:
        return None
    return attention_factor(shape) ** 2 / math.sqrt(shape.kv_channels)


def attention_factor(shape: ModelShape) -> float:
    """Return YaRN's factor of rotated queries and keys, as given or as the paper recommends; 1 without YaRN."""
    factor = shape.yarn_rotary_scaling_factor
    if factor is None or shape.yarn_attention_factor is not None:
        return shape.yarn_attention_factor or 1.0
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def layers_without_positions(shape: ModelShape) -> list[int] | None:
    """Return 1 for each layer without rotary positions and 0 for the others; None if all have them."""
    every = shape.no_rope_freq
    return None if every is None else [int((layer + 1) % every == 0) for layer in range(shape.num_layers)]


def _llama3(plain: Tensor, shape: ModelShape, factor: float) -> Tensor:
    low, high = shape.rope_scaling_low_freq_factor, shape.rope_scaling_high_freq_factor
    old_length = shape.rope_scaling_original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    share = (old_length / wavelength - low) / (high - low)
    between = (1 - share) * plain / factor + share * plain
    scaled = torch.where(wavelength > old_length / low, plain / factor, between)
    return torch.where(wavelength < old_length / high, plain, scaled)


def _yarn(plain: Tensor, shape: ModelShape, factor: float) -> Tensor:
    rotated, old_length = 2 * len(plain), shape.yarn_original_max_position_embeddings
    assert old_length is not None

    def pair_that_turns(turns: float) -> float:
        return rotated * math.log(old_length / (turns * 2 * math.pi)) / (2 * math.log(shape.rotary_base))

    first, last = pair_that_turns(shape.yarn_beta_fast), pair_that_turns(shape.yarn_beta_slow)
    if shape.yarn_correction_range_round_to_int:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001
    scaled_share = ((torch.arange(len(plain), dtype=torch.float32) - first) / width).clamp(0, 1)
    return plain / factor * scaled_share + plain * (1 - scaled_share)
