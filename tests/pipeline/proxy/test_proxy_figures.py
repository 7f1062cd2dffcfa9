"""A proxy's figures against slow twins, and the pooled head against a loop over samples and positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megakd.model.proxy.head import ValueHead, pool
from megakd.pipeline.proxy.figures import correlation, describe, draw, fit_line, judge, table


def slow_ranks(values: np.ndarray) -> list[float]:
    return [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]


@pytest.mark.parametrize("levels", [3, 1000])
def test_figures_equal_the_twin(levels: int) -> None:
    rng = np.random.default_rng(levels)
    true = rng.integers(0, levels, 101) / 7
    predicted = true + rng.integers(-levels // 3, levels // 3 + 1, 101) / 7
    found = judge(true, predicted, ratio=0.3)
    assert found["pearson"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(slow_ranks(true), slow_ranks(predicted))[0, 1])
    assert found["r_squared"] == pytest.approx(1 - ((predicted - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())
    kept = [set(sorted(range(101), key=lambda i, v=v: (-v[i], i))[:30]) for v in (true, predicted)]  # type: ignore[misc]
    assert found["keep_agreement"] == sum((i in kept[0]) == (i in kept[1]) for i in range(101)) / 101


def test_perfect_opposite_and_constant() -> None:
    true = np.random.default_rng(0).normal(size=40)
    same, opposite = judge(true, true, ratio=0.5), judge(true, -true, ratio=0.5)
    assert same == pytest.approx({"pearson": 1, "spearman": 1, "r_squared": 1, "keep_agreement": 1})
    assert (opposite["spearman"], opposite["keep_agreement"]) == (pytest.approx(-1), 0)
    assert correlation(true, np.ones(40)) is None
    figures = describe(true, {"proxy": true}, ratio=0.25)
    assert figures["constant"]["keep_agreement"] == 0.25**2 + 0.75**2
    lines = table(figures, ratio=0.25).splitlines()
    assert lines[0].endswith("agrees at 0.25") and lines[2].split() == ["constant", "-", "-", "0.0000", "0.6250"]
    assert draw(true, true).startswith(b"\x89PNG")


def test_the_line_is_the_least_squares() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=50)
    y = 2 - 0.5 * x + rng.normal(size=50)
    slope, offset = np.polyfit(x, y, 1)
    assert fit_line(x, y) == pytest.approx((offset, slope))
    assert fit_line(np.ones(3), np.array([1.0, 2, 3])) == (2, 0)


def test_pooling_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_SBH = torch.randn(7, 5, 13, generator=generator)
    mask_BS = torch.rand(5, 7, generator=generator) < 0.6
    mask_BS[3] = False
    hidden_SBH[~mask_BS.t()] = torch.nan  # whatever stands there must not matter
    head = ValueHead(13, device=torch.device("cpu"))
    assert (head(hidden_SBH, mask_BS) == 0).all()
    with torch.no_grad():
        head.weight.copy_(torch.randn(13, generator=generator))
        head.bias.fill_(0.3)
    values_B = head(hidden_SBH, mask_BS)
    for sample in range(5):
        rows = [hidden_SBH[s, sample].double() for s in range(7) if mask_BS[sample, s]]
        mean_H = sum(rows) / len(rows) if rows else torch.zeros(13, dtype=torch.float64)
        torch.testing.assert_close(pool(hidden_SBH, mask_BS)[sample].double(), mean_H, atol=1e-6, rtol=1e-6)
        expected = float((mean_H * head.weight.double()).sum()) + 0.3
        assert float(values_B[sample]) == pytest.approx(expected, abs=1e-5)
    values_B.sum().backward()
    assert head.weight.grad is not None and torch.isfinite(head.weight.grad).all()


def test_gradients_stop_at_masked_positions() -> None:
    hidden_SBH = torch.full((3, 1, 2), torch.nan)
    hidden_SBH[0] = 1.0
    hidden_SBH.requires_grad_()
    pool(hidden_SBH, torch.tensor([[True, False, False]])).sum().backward()
    assert hidden_SBH.grad is not None
    assert hidden_SBH.grad.tolist() == [[[1, 1]], [[0, 0]], [[0, 0]]]
