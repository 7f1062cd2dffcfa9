"""The scaling fit: the paper's published constants and extrapolations, and laws found again from their own points."""

import math

import numpy as np
import pytest

from megakd.errors import UsageError
from megakd.pipeline.planning.scaling_law import ScalingLaw, fit_scaling

# MiniPLM (arXiv 2410.17215): A, a and L_inf of its fits on DCLM, and the losses it extrapolates to 1T and 10T tokens.
PAPER = [
    # model, method, A, a, L_inf, L(1T), L(10T)
    ("200M", "PT", 2.19e7, 0.41, 3.30, 3.35, 3.32),
    ("200M", "Vanilla KD", 9.77e7, 0.44, 3.34, 3.39, 3.35),
    ("200M", "MiniPLM", 8.56e10, 0.59, 3.25, 3.28, 3.26),
    ("500M", "PT", 2.73e8, 0.45, 3.06, 3.12, 3.08),
    ("500M", "Vanilla KD", 3.14e8, 0.45, 3.05, 3.12, 3.07),
    ("500M", "MiniPLM", 6.64e9, 0.52, 3.03, 3.06, 3.04),
    ("1.2B", "PT", 1.88e8, 0.43, 2.91, 2.98, 2.94),
    ("1.2B", "Vanilla KD", 1.10e10, 0.52, 2.90, 2.95, 2.91),
    ("1.2B", "MiniPLM", 4.29e8, 0.45, 2.86, 2.92, 2.88),
]
FLOPS_1T = {"200M": 1.26e21, "500M": 3.14e21, "1.2B": 7.30e21}
# Two of the eighteen do not follow from the constants as they are printed: the recomputed values are 3.0740 and 3.3584.
BEYOND_ROUNDING = {("500M", "MiniPLM", 1e12), ("200M", "Vanilla KD", 1e13)}
LAWS = [(model, ScalingLaw(floor, scale, exponent)) for model, _, scale, exponent, floor, *_ in PAPER]


def points(law, model, count=12):
    """From a thousandth to a twentieth of 1T tokens, the span of the paper's runs."""
    flops = np.geomspace(FLOPS_1T[model] / 1000, FLOPS_1T[model] / 20, count)
    return flops, law.floor + law.coefficient / flops**law.exponent


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_papers_extrapolations(row):
    model, method, coefficient, exponent, floor, *printed = row
    law = ScalingLaw(floor, coefficient, exponent)
    for tokens, value in zip((1e12, 1e13), printed):
        distance = abs(law.loss(FLOPS_1T[model] * tokens / 1e12) - value)
        if (model, method, tokens) in BEYOND_ROUNDING:
            assert 0.005 < distance < 0.015
        else:
            assert distance < 0.005  # both are printed to two decimals


@pytest.mark.parametrize("model, law", LAWS)
def test_a_law_is_found_from_its_own_points(model, law):
    fit = fit_scaling(*points(law, model), num_replicates=20)
    for name in ("floor", "coefficient", "exponent"):
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-6)
    beyond = fit.at(10 * FLOPS_1T[model])
    assert beyond.value == pytest.approx(law.loss(10 * FLOPS_1T[model]), abs=1e-8)
    assert beyond.high - beyond.low < 1e-6 and not fit.doubts


@pytest.mark.parametrize("model, law", LAWS)
def test_a_law_is_found_through_noise(model, law):
    flops, loss = points(law, model, 16)
    noisy = loss * np.exp(1e-3 * np.random.default_rng(3).standard_normal(16))
    fit = fit_scaling(flops, noisy)
    target = FLOPS_1T[model]
    estimate, truth = fit.at(target), law.loss(target)
    assert estimate.value == pytest.approx(truth, abs=0.015)  # 3e-3 of noise, carried on 20 times the last point
    assert estimate.low < truth < estimate.high and estimate.high - estimate.low < 0.06
    assert fit.constants["floor"].low < law.floor < fit.constants["floor"].high
    assert fit.constants["exponent"].low < law.exponent < fit.constants["exponent"].high


def test_one_bad_point_weighs_little():
    model, law = LAWS[3]
    flops, loss = points(law, model)
    loss[4] *= 1.2
    robust = fit_scaling(flops, loss, num_replicates=0)
    squares = fit_scaling(flops, loss, num_replicates=0, huber_delta=10.0)
    target = FLOPS_1T[model]
    assert abs(robust.at(target).value - law.loss(target)) < 0.003
    assert abs(squares.at(target).value - law.loss(target)) > 0.3


@pytest.mark.slow
def test_intervals_cover_nearly_as_often_as_they_say():
    """Of 200 draws the intervals of 80% hold the truth 73 to 76%, those of 95% 90 to 94% (6, 12 and 40 points)."""
    model, law = LAWS[0]
    flops, loss = points(law, model)
    target, covered = FLOPS_1T[model], 0
    for seed in range(40):
        noisy = loss * np.exp(2e-3 * np.random.default_rng(seed).standard_normal(12))
        estimate = fit_scaling(flops, noisy, num_replicates=100, level=0.8, seed=seed).at(target)
        covered += estimate.low < law.loss(target) < estimate.high
    assert 22 <= covered <= 38


@pytest.mark.parametrize("seed", range(4))
def test_no_grid_finds_a_better_fit(seed):
    """The slow twin: the same objective on a grid of all three constants, refined around its best."""
    random = np.random.default_rng(seed)
    flops = np.sort(10 ** random.uniform(18, 20, 9))
    loss = 3 + 50 * (flops / 1e17) ** -0.6 + 0.02 * random.standard_normal(9)
    fit, delta = fit_scaling(flops, loss, num_replicates=0, huber_delta=2e-3), 2e-3
    assert slow_cost(flops, loss, delta, fit.law.floor, fit.law.coefficient, fit.law.exponent) <= slow_best(
        flops, loss, delta
    ) * (1 + 1e-6)


def slow_cost(flops, loss, delta, floor, coefficient, exponent):
    total = 0.0
    for c, value in zip(flops.tolist(), loss.tolist()):
        size = abs(math.log(value) - math.log(floor + coefficient / c**exponent))
        total += 0.5 * size**2 if size <= delta else delta * (size - 0.5 * delta)
    return total


def slow_best(flops, loss, delta):
    middle = float(np.exp(np.log(flops).mean()))
    ranges = [(0.5, float(loss.min())), (0.01, 3.0), (0.05, 1.5)]  # floor, the falling term at the middle, exponent
    best = math.inf
    for _ in range(8):
        axes = [np.linspace(low, high, 13).tolist() for low, high in ranges]
        cost, place = min(
            (slow_cost(flops, loss, delta, floor, term * middle**exponent, exponent), (floor, term, exponent))
            for floor in axes[0]
            for term in axes[1]
            for exponent in axes[2]
        )
        best = min(best, cost)
        ranges = [
            (max(1e-3, value - (high - low) / 6), value + (high - low) / 6) for value, (low, high) in zip(place, ranges)
        ]
    return best


def test_the_order_of_points_does_not_matter_and_the_seed_does_it_all():
    flops, loss = points(LAWS[0][1], "200M")
    loss *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(12))
    shuffled = np.random.default_rng(1).permutation(12)
    one, two = fit_scaling(flops, loss, seed=5), fit_scaling(flops[shuffled], loss[shuffled], seed=5)
    assert one.at(1e22) == two.at(1e22) and one.at(1e22) != fit_scaling(flops, loss, seed=6).at(1e22)


def test_flops_inverts_loss():
    for _, law in LAWS:
        assert law.flops(law.loss(3e20)) == pytest.approx(3e20, rel=1e-9)
        assert law.flops(law.floor) == math.inf
    assert ScalingLaw(1.0, 1.0, 1e-3).flops(1.0001) == math.inf  # past the largest float


def test_doubts():
    flops = np.geomspace(1e18, 3e18, 8)
    narrow = fit_scaling(flops, 3 + 2e7 / flops**0.41, num_replicates=10)
    assert any("factor 3 " in doubt for doubt in narrow.doubts)
    flops = np.geomspace(1e16, 1e18, 8)
    loss = 1e4 / flops**0.2 * np.exp(0.01 * np.random.default_rng(0).standard_normal(8))  # no floor at all
    assert any("floor" in doubt for doubt in fit_scaling(flops, loss).doubts)


@pytest.mark.parametrize(
    "flops, loss, message",
    [
        ([1e18, 2e18, 3e18, 4e18], [4, 3, 2.5, 2.2], "4 points .* at least 5"),
        ([1e18] * 9, np.linspace(4, 3, 9), "1 points of different compute"),
        ([1e18, 2e18, 3e18, 4e18, 5e18], [4, 3, math.nan, 2.2, 2], "loss nan after 3e"),
        ([0, 2e18, 3e18, 4e18, 5e18], [4, 3, 2.5, 2.2, 2], "after 0.0 FLOPs"),
        ([1e18, 2e18, 3e18, 4e18, 5e18], [3, 3.1, 3.2, 3.3, 3.4], "does not fall"),
        ([], [], "0 points"),
    ],
)
def test_refusals(flops, loss, message):
    with pytest.raises(UsageError, match=f"run 7: .*{message}"):
        fit_scaling(np.array(flops), np.array(loss), name="run 7")
