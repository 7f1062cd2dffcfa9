"""Keys of samples: floats in their order, ties by a hash, noise that no processor decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pipeline.select.select_twin import gumbel, hash_key, hash_of, write

from megakd.data.scores.sources import open_sources
from megakd.pipeline.select.keys import NOTHING, Rule, SampleKeys, images_of, score_at


def open_keys(folder: Path, values: object, rule: Rule) -> SampleKeys:
    write(folder / "m", values, np.ones(len(np.atleast_1d(values)), np.int32))
    (source,) = open_sources({"m": [str(folder / "m")]}, outputs=["out"])
    return SampleKeys(source, rule)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_images_have_the_order_of_their_floats(values: list[float]) -> None:
    floats = np.array(values, np.float32)
    images = images_of(floats)
    for i, j in zip(range(len(floats)), range(1, len(floats))):
        if floats[i] != floats[j]:
            assert (images[i] < images[j]) == (floats[i] < floats[j])
        else:  # equal, but -0 lies right below 0
            assert abs(int(images[i]) - int(images[j])) == int(np.signbit(floats[i]) != np.signbit(floats[j]))
    assert [score_at(int(image) << 64) for image in images] == [v if np.isfinite(v) else None for v in floats.tolist()]


def test_images_of_what_is_not_finite() -> None:
    ends = np.array(
        [-np.inf, np.finfo(np.float32).min, -0.0, 0.0, np.finfo(np.float32).max, np.inf, np.nan], np.float32
    )
    images = images_of(ends).astype(np.int64)
    assert (np.diff(images) > 0).all() and images[3] - images[2] == 1


def test_a_range_of_keys_cuts_among_samples_of_one_score(tmp_path: Path) -> None:
    keys = open_keys(tmp_path, np.full(2000, -1.0), Rule({"m": 1.0}, 3))
    image = int(images_of(np.ones(1, np.float32))[0])
    hashes = [hash_of(i ^ hash_key("tie", 3, "d0")) for i in range(2000)]
    low, high = sorted(hashes)[500], sorted(hashes)[1700]
    ids, images = keys.between(0, 2000, image << 64 | low, image << 64 | high)
    assert ids.tolist() == [i for i in range(2000) if low <= hashes[i] < high] and set(images.tolist()) == {image}
    below = open_keys(tmp_path, np.full(2000, -1.0), Rule({"m": 1.0}, 3, below=image << 64 | low))
    assert below.between(0, 2000, 0, NOTHING)[0].tolist() == [i for i in range(2000) if hashes[i] < low]


def test_noise_is_that_of_the_c_library(tmp_path: Path) -> None:
    """Every bit: numpy's logarithm is not the same on all processors."""
    size = 30_000
    values = np.random.default_rng(0).normal(-3, 1, size).astype(np.float32)
    values[:3] = [0, -1e38, 1e38]
    for temperature in (0.3, 1e-30):
        keys = open_keys(tmp_path, values, Rule({"m": 1.0}, 5, gumbel_temperature=temperature))
        noise = gumbel(range(size), 5, "d0")
        with np.errstate(over="ignore"):
            expected = ((-values).astype(np.float64) / temperature + noise).astype(np.float32)
        assert keys.between(0, size, 0, NOTHING)[1].tolist() == images_of(expected).tolist()
