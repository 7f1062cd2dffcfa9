"""The blend against a twin that deals out one position after the other."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.blend import Blend, parse_data_path
from megakd.data.order import permute
from megakd.errors import UsageError

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


def blend_of(sizes, weights, seed=3):
    return Blend([SimpleNamespace(num_samples=size) for size in sizes], weights, seed)


def slow_draws(sizes, quanta, seed, count):
    """Walk the positions, keep a counter per level, and use exact fractions."""
    seen, result = [0] * len(sizes), []
    passed = [0] * len(sizes)
    for _ in range(count):
        for dataset, size in enumerate(sizes):
            passed[dataset] += 1
            share = Fraction(quanta[dataset], sum(quanta[dataset:]))
            if (passed[dataset] * share).__floor__() > seen[dataset]:
                epoch, place = divmod(seen[dataset], size)
                seen[dataset] += 1
                sample = int(permute(place, num_samples=size, seed=seed + dataset, epoch=epoch))
                result.append((dataset, sample))
                break
    return result


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.data())
def test_draws_equal_the_slow_twin(weights, data):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=len(weights), max_size=len(weights)))
    blend = blend_of(sizes, weights)
    draws = blend.draw(np.arange(200))
    twin = slow_draws(sizes, blend._quanta, 3, 200)
    assert list(zip(draws.dataset_index.tolist(), draws.sample_id.tolist())) == twin


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(1, 3000))
def test_counts_are_exact_to_one_per_level(weights, count):
    blend = blend_of([10**9] * len(weights), weights)
    counts = np.bincount(blend.draw(np.arange(count)).dataset_index, minlength=len(weights))
    for level, (have, share) in enumerate(zip(counts, blend.weights)):
        assert abs(have - count * share) <= level + 1
    assert np.allclose(blend.weights, np.array(weights) / sum(weights), atol=2**-31) and sum(blend.weights) == 1


def test_every_sample_comes_once_an_epoch():
    blend = blend_of([7, 13], [7, 13])
    draws = blend.draw(np.arange(60))
    for dataset, size in enumerate((7, 13)):
        ids = draws.sample_id[draws.dataset_index == dataset]
        for epoch in range(len(ids) // size):
            assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert draws.sample_id[:20].tolist() != draws.sample_id[20:40].tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_a_position_can_be_asked_for_alone_and_far_out(positions):
    blend = blend_of([10**9, 77, 10**12], [0.7, 1e-6, 0.2])
    together = blend.draw(np.array(positions))
    for row, position in enumerate(positions):
        alone = blend.draw(np.array([position]))
        assert (alone.dataset_index[0], alone.sample_id[0]) == (together.dataset_index[row], together.sample_id[row])


def test_far_positions_use_exact_arithmetic():
    blend = blend_of([10**9, 10**9], [1 / 3, 2 / 3])
    start = 2**55
    index = blend.draw(np.arange(start, start + 3000)).dataset_index
    share = Fraction(blend._quanta[0], 2**32)
    twin = [int(((n + 1) * share).__floor__() <= (n * share).__floor__()) for n in range(start, start + 3000)]
    assert index.tolist() == twin


def test_no_weights_means_in_proportion_to_samples():
    assert blend_of([10, 30], None).weights == [0.25, 0.75]


def test_equal_datasets_do_not_run_in_step():
    draws = blend_of([100, 100], [1, 1]).draw(np.arange(200))
    assert draws.sample_id[draws.dataset_index == 0].tolist() != draws.sample_id[draws.dataset_index == 1].tolist()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_bad_weights_are_refused_with_the_value(bad):
    with pytest.raises(UsageError, match=f"weight {bad}"):
        blend_of([5, 5], [1.0, bad])
    with pytest.raises(UsageError, match=f"weight {bad}"):
        parse_data_path(["1.0", "a", str(bad), "b"])


def test_blend_refuses():
    with pytest.raises(UsageError, match="1 weights for 2"):
        blend_of([5, 5], [1.0])
    with pytest.raises(UsageError, match="empty"):
        blend_of([], None)
    with pytest.raises(UsageError, match="seed -1"):
        blend_of([5], None, seed=-1)


def test_parse_data_path():
    assert parse_data_path(["a"]) == (None, ["a"])
    assert parse_data_path(["a", "b", "c"]) == (None, ["a", "b", "c"])
    assert parse_data_path(["0.3", "a", "7", "b"]) == ([0.3, 7.0], ["a", "b"])
    for bad in ([], ["0.3"], ["0.3", "a", "b"], ["a", "0.3", "b", "0.7"], ["1", "a", "b", "c"], ["1", "2"]):
        with pytest.raises(UsageError, match="data-path"):
            parse_data_path(bad)
