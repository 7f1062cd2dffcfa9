"""Attention of the end of a sequence to all of it, as context parallelism computes it, against whole scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd.model.attention import attend_by_alignment, attend_with_mask

BATCH, HEADS, WIDTH, SCALE = 2, 6, 5, 0.4


def twin(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Whole scores; query head n reads the key head of its group."""
    copies, chunk, stop = HEADS // key.shape[1], query.shape[2], key.shape[2]
    out = torch.empty_like(query)
    for head in range(HEADS):
        scores = query[:, head] @ key[:, head // copies].mT * SCALE
        for token in range(chunk):
            scores[:, token, stop - chunk + token + 1 :] = -torch.inf
        out[:, head] = scores.softmax(-1) @ value[:, head // copies]
    return out


@pytest.mark.parametrize("attend", [attend_with_mask, attend_by_alignment])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("chunk", "stop"), [(3, 3), (3, 6), (3, 21), (1, 7)])
def test_it_equals_whole_scores(attend: object, groups: int, chunk: int, stop: int) -> None:
    torch.manual_seed(0)
    sizes = [(HEADS, chunk), (groups, stop), (groups, stop)]
    inputs = [torch.randn(BATCH, *size, WIDTH, dtype=torch.float64, requires_grad=True) for size in sizes]
    found = attend(*inputs, dropout=0.0, scale=SCALE)  # type: ignore[operator]
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    expected = twin(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
