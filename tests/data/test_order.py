"""The order of samples is a permutation that mixes."""

import math
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.order import permute


@pytest.mark.parametrize("num_samples", [*range(1, 40), 97, 251, 252, 256, 257, 1000, 65537])
def test_permute_is_a_bijection(num_samples):
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**61, 10**9)):
        places = permute(np.arange(num_samples), num_samples=num_samples, seed=seed, epoch=epoch)
        assert np.array_equal(np.sort(places), np.arange(num_samples))


def slow_permute(place, num_samples, seed, epoch):
    """docs/formats.md, one place at a time, in Python's own integers."""
    a = math.isqrt(num_samples - 1) + 1
    b = -(-num_samples // a)
    keys = [xxhash.xxh3_64_intdigest(struct.pack("<qqq", seed, epoch, r)) for r in range(8)]

    def h(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    while True:
        y, x = divmod(place, a)
        for j in range(4):
            x = (x + h(y ^ keys[2 * j]) % a) % a
            y = (y + h(x ^ keys[2 * j + 1]) % b) % b
        place = y * a + x
        if place < num_samples:
            return place


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**50), st.integers(0, 2**61), st.integers(0, 2**31), st.data())
def test_permute_equals_the_slow_twin(num_samples, seed, epoch, data):
    places = data.draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=9))
    fast = permute(np.array(places), num_samples=num_samples, seed=seed, epoch=epoch)
    assert fast.tolist() == [slow_permute(place, num_samples, seed, epoch) for place in places]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**61), st.integers(0, 2**31), st.data())
def test_permute_reads_any_place_alone(num_samples, seed, epoch, data):
    places = np.array(data.draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=9)))
    together = permute(places, num_samples=num_samples, seed=seed, epoch=epoch)
    assert together.min() >= 0 and together.max() < num_samples
    assert len(set(together.tolist())) == len(set(places.tolist()))
    for place, sample in zip(places.tolist(), together.tolist()):
        assert int(permute(place, num_samples=num_samples, seed=seed, epoch=epoch)) == sample
    assert permute(places.reshape(1, -1), num_samples=num_samples, seed=seed, epoch=epoch).shape == (1, len(places))


def test_permute_refuses_places_outside():
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            permute(np.array([bad]), num_samples=5, seed=0, epoch=0)


def test_this_order_is_a_promise():
    """These numbers may never change: a resumed run must see the samples it would have seen."""
    assert permute(np.arange(8), num_samples=10**6, seed=1234, epoch=2).tolist() == [
        22020,
        169659,
        125926,
        939023,
        834223,
        314870,
        690286,
        509933,
    ]


def chi_square(observed, expected):
    return ((observed - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("num_samples", [5, 12, 30])
def test_every_sample_is_equally_likely_at_every_place(num_samples):
    """Over seeds; chi-square with (n-1)^2 degrees of freedom, six sigma: the seeds are fixed, so it cannot flicker."""
    seeds = 3000
    counts = np.zeros((num_samples, num_samples))
    for seed in range(seeds):
        counts[
            np.arange(num_samples), permute(np.arange(num_samples), num_samples=num_samples, seed=seed, epoch=0)
        ] += 1
    freedom = (num_samples - 1) ** 2
    assert abs(chi_square(counts, seeds / num_samples) - freedom) < 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("num_samples", [4096, 10007, 99991])
def test_neighbours_and_epochs_are_independent(num_samples):
    places = np.arange(num_samples)
    first, second = (permute(places, num_samples=num_samples, seed=7, epoch=e).astype(float) for e in (0, 1))
    sigma = 1 / np.sqrt(num_samples)
    for a, b in ((first, places), (first[1:], first[:-1]), (first[2:], first[:-2]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 * sigma
    # The distance between the samples of neighbouring places falls in 16 equal classes (mod n) as chance would have it.
    steps = np.bincount((np.diff(first) % num_samples * 16 // num_samples).astype(int), minlength=16)
    assert chi_square(steps, (num_samples - 1) / 16) < 15 + 6 * np.sqrt(30)
    assert (first == places).sum() < 10 and (first == second).sum() < 10


def test_all_orders_of_four_occur():
    seen = {tuple(permute(np.arange(4), num_samples=4, seed=seed, epoch=0).tolist()) for seed in range(1000)}
    assert len(seen) == 24
