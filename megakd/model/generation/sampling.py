"""Choice of the next token from the hidden states behind a text: the most probable one, or a draw.

Axes: ``B`` sequences, ``H`` hidden, ``v`` this rank's slice of the vocabulary, ``K`` ids that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.read import read_head
from megakd.losses.vocab_parallel import VocabShard

_LOOKED_AT = 256  # ids that usually hold the nucleus; more are read where they do not


@dataclass(frozen=True)
class Sampling:
    """Way of choosing the next token.

    temperature: divisor of the logits; None for the most probable token each time, without a draw. top_k: only so many
    of the most probable ids can be drawn; 0 for all. top_p: of these, only the fewest whose mass reaches this share.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn."""
        return self.temperature is None


@torch.no_grad()
def next_tokens(
    hidden_BH: Tensor,
    weight_vH: Tensor,
    *,
    shard: VocabShard,
    sampling: Sampling,
    uniforms_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the next token of each sequence; all ranks of the vocabulary's group call it.

    uniforms_B: float64 in [0, 1), multiples of 2^-53, that decide the draws; needed unless ``sampling`` is greedy.

    The ids that can be drawn are found in the order of transformers: temperature, then top-k, then top-p of what is
    left (Holtzman et al. 2020, arXiv 1904.09751): an id stays if the more probable ones hold less than ``top_p``. Of
    equal ids the smaller comes first. Returns ids, int64 ``[B]``, and their log-probabilities under the model itself,
    at temperature 1 and without any truncation, ``[B]``; the same on every rank.
    """
    if sampling.greedy:
        reading = read_head(hidden_BH, weight_vH, shard=shard, top_k=1)
        assert reading.top_ids_TK is not None and reading.top_log_probs_TK is not None
        return reading.top_ids_TK[:, 0], reading.top_log_probs_TK[:, 0]
    if uniforms_B is None:
        raise UsageError("a draw needs a uniform number for each sequence; uniforms_B is None")
    ids_B = _draw(hidden_BH, weight_vH, shard, sampling, uniforms_B)
    reading = read_head(hidden_BH, weight_vH, shard=shard, ids_T=ids_B)
    assert reading.log_prob_T is not None
    return ids_B, reading.log_prob_T


def _draw(hidden_BH: Tensor, weight_vH: Tensor, shard: VocabShard, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    assert sampling.temperature is not None
    cooled_BH = (hidden_BH.float() / sampling.temperature).to(hidden_BH.dtype)
    if not sampling.top_k and sampling.top_p == 1:
        drawn = read_head(cooled_BH, weight_vH, shard=shard, uniforms_TN=uniforms_B[:, None]).drawn_ids_TN
        assert drawn is not None
        return drawn[:, 0]
    count = min(sampling.top_k or _LOOKED_AT, shard.vocab_size)
    while True:
        reading = read_head(cooled_BH, weight_vH, shard=shard, top_k=count)
        assert reading.top_ids_TK is not None and reading.top_log_probs_TK is not None
        mass_BK = reading.top_log_probs_TK.double().exp()
        if sampling.top_k or count == shard.vocab_size or bool((mass_BK.sum(1) >= sampling.top_p).all()):
            break
        count = min(16 * count, shard.vocab_size)
    if sampling.top_k:
        mass_BK = mass_BK / mass_BK.sum(1, keepdim=True)
    before_BK = mass_BK.cumsum(1) - mass_BK
    mass_BK = torch.where(before_BK < sampling.top_p, mass_BK, 0.0)
    mass_BK[:, 0].clamp_(min=torch.finfo(torch.float64).tiny)  # the best stays, whatever its rounding
    upto_BK = mass_BK.cumsum(1)
    place_B1 = (upto_BK <= uniforms_B[:, None] * upto_BK[:, -1:]).sum(1, keepdim=True)
    last_B1 = (mass_BK > 0).sum(1, keepdim=True) - 1  # a number that rounds up to the whole mass
    return reading.top_ids_TK.gather(1, torch.minimum(place_B1, last_B1))[:, 0]
