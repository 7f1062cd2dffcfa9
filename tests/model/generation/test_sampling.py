"""Draws of the next token: exactly the ids that temperature, top-k and top-p leave, with their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megakd.errors import UsageError
from megakd.losses.vocab_parallel import VocabShard
from megakd.model.generation.generate import draw_keys
from megakd.model.generation.sampling import Sampling, next_tokens

VOCAB = 701
DRAWS = 4000


def draw(logits_V: np.ndarray, **sampling: Any) -> np.ndarray:
    """``DRAWS`` ids from one row of logits, for evenly spaced uniform numbers."""
    hidden = torch.eye(1, 8, dtype=torch.float64).expand(DRAWS, 8).contiguous()
    weight = torch.zeros(VOCAB + 3, 8, dtype=torch.float64)  # three rows of padding, which would win
    weight[:VOCAB, 0], weight[VOCAB:, 0] = torch.from_numpy(logits_V), 1e3
    shard = VocabShard(start=0, num_rows=VOCAB + 3, vocab_size=VOCAB, group=None)
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) * (2**53 // DRAWS)).floor() * 2.0**-53
    ids, log_probs = next_tokens(hidden, weight, shard=shard, sampling=Sampling(**sampling), uniforms_B=uniforms)
    expected = torch.from_numpy(logits_V).log_softmax(0)[ids]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    return ids.numpy()


def twin(logits_V: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities ``[V]`` of each id, step by step."""
    order = sorted(range(VOCAB), key=lambda i: (-logits_V[i], i))
    allowed = order[: top_k or VOCAB]
    mass = {i: float(np.exp((logits_V[i] - logits_V[order[0]]) / temperature)) for i in allowed}
    whole, before, kept = sum(mass.values()), 0.0, {}
    for i in allowed:
        if before < top_p * whole:
            kept[i] = mass[i]
        before += mass[i]
    probabilities = np.zeros(VOCAB)
    for i, value in kept.items():
        probabilities[i] = value / sum(kept.values())
    return probabilities


LOGITS = np.random.default_rng(3).normal(size=VOCAB) * 2.5
WAYS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 3.0, "top_p": 0.95},  # a nucleus of more ids than are looked at first
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-9},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_draws_have_the_probabilities_of_the_twin(way: dict[str, Any]) -> None:
    ids, expected = draw(LOGITS, **way), twin(LOGITS, **way)
    share = np.bincount(ids, minlength=VOCAB) / DRAWS
    assert not share[expected == 0].any(), "an id that was cut off was drawn"
    if "top_k" in way or "top_p" in way:  # by the inverse of the distribution: each share within one number
        assert np.abs(share - expected).max() <= 1.01 / DRAWS
    else:
        deviation = np.sqrt(expected * (1 - expected) / DRAWS)
        assert (np.abs(share - expected) <= 5 * deviation + 2 / DRAWS).all()


def test_ties_at_an_edge_go_to_the_smaller_id() -> None:
    logits = np.zeros(VOCAB)
    assert set(draw(logits, temperature=1.0, top_k=3)) == {0, 1, 2}
    logits[[5, 9]] = 1.0
    assert set(draw(logits, temperature=1.0, top_k=1)) == {5}
    assert set(draw(logits)) == {5}


def test_one_best_id_is_greedy() -> None:
    assert set(draw(LOGITS, temperature=5.0, top_k=1)) == set(draw(LOGITS)) == {int(LOGITS.argmax())}


def test_a_draw_needs_its_number() -> None:
    shard = VocabShard(start=0, num_rows=4, vocab_size=4, group=None)
    with pytest.raises(UsageError, match="uniform number"):
        next_tokens(torch.ones(1, 2), torch.ones(4, 2), shard=shard, sampling=Sampling(1.0))


def test_keys_of_draws_depend_on_the_prompt_alone() -> None:
    first = draw_keys([[1, 2], [3], [1, 2]], seed=1)
    assert first == [draw_keys([[1, 2]], 1)[0], draw_keys([[3]], 1)[0], first[2]]
    assert len(set(first)) == 3 and not set(first) & set(draw_keys([[1, 2], [3], [1, 2]], seed=2))
