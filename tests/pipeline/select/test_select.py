"""Selecting by radix histograms on disk equals selecting by a full sort in memory, ties included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pipeline.select.select_corpus import Corpus, configure, run
from pipeline.select.select_twin import ordered, scores_of, write

from megakd.data.scores import sources as select_sources
from megakd.data.selection import Selection
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.select import keys as select_keys
from megakd.pipeline.select.main import main


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_keys, "_COLLECTED", select_keys._COLLECTED)  # put back at the end


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 2, 5, 1000]),
    ratio=st.sampled_from([0.03, 0.3, 0.5, 0.75, 1.0]),
    by_tokens=st.booleans(),
    drop_negative=st.booleans(),
    drop_top=st.sampled_from([0.0, 0.125, 0.5]),
    temperature=st.sampled_from([0.0, 0.7]),
    uniform=st.booleans(),
    collected=st.sampled_from([0, 3, 1 << 19]),
)
@example(  # its only sample has nothing to score
    sizes=[1], seed=701, levels=1, ratio=1.0, by_tokens=False, drop_negative=False, drop_top=0.0, temperature=0.0,
    uniform=False, collected=0,
)  # fmt: skip
def test_select_is_the_full_sort(
    as_it_was: None,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    seed: int,
    levels: int,
    ratio: float,
    by_tokens: bool,
    drop_negative: bool,
    drop_top: float,
    temperature: float,
    uniform: bool,
    collected: int,
) -> None:
    select_keys._COLLECTED = collected
    corpus = Corpus(tmp_path_factory.mktemp("twin"), sizes, seed, levels=levels, uniform=uniform)
    expected = corpus.twin(
        ratio, by_tokens=by_tokens, drop_negative=drop_negative, drop_top=drop_top, temperature=temperature
    )
    flags = ["--ratio", ratio, "--ratio-of", "tokens" if by_tokens else "samples", "--drop-top-fraction", drop_top]
    flags += ["--gumbel-temperature", temperature, *(["--drop-negative"] if drop_negative else [])]
    if not any(expected):
        scored = any(counts.any() for counts in corpus.counts)
        with pytest.raises(UsageError, match="keep" if scored else "there is no sample to select from"):
            run(*corpus.flags(), *flags)
        return
    assert run(*corpus.flags(), *flags) == expected


def test_beyond_a_block_a_stretch_and_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_keys, "_AT_ONCE", 7001)
    rng = np.random.default_rng(3)
    size = 150_001
    counts = np.full(size, 4)
    teacher, reference = (-rng.integers(1, 400, size).astype(np.float32) for _ in range(2))
    for kind, values in (("t", teacher), ("r", reference)):
        write(tmp_path / kind, values, counts, model=kind)
    flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--output", tmp_path / "o"]
    scores = scores_of([(1.0, reference), (-1.0, teacher)], counts)
    for threads, ratio, collected in ((1, 0.4, 0), (3, 0.4, 1 << 19), (2, 0.77777, 1000)):
        monkeypatch.setattr(select_keys, "_COLLECTED", collected)
        (kept,) = run(*flags, "--threads", threads, "--ratio", ratio)
        assert len(kept) == int(ratio * size)
        assert scores[kept].min() >= np.delete(scores, kept).max()
        assert kept == run(*flags, "--threads", 1, "--ratio", ratio)[0]


def test_the_set_does_not_depend_on_the_order_of_the_datasets(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [40, 30, 50], 5, levels=1)
    expected = corpus.twin(0.3)
    for order in itertools.permutations(range(3)):
        kept = run(*corpus.flags(list(order)), "--ratio", 0.3)
        assert [kept[order.index(d)] for d in range(3)] == expected
    assert run(*corpus.flags(), "--ratio", 0.3, "--seed", 1) != expected  # all tie: the seed decides
    assert run(*corpus.flags(), "--ratio", 0.3, "--seed", 1) == corpus.twin(0.3, seed=1)


def test_ties_are_cut_exactly_and_at_random(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [30_000], 1, levels=1, uniform=True)
    (kept,) = run(*corpus.flags(), "--ratio", 0.5)
    assert len(kept) == 15_000
    halves = sum(i < 15_000 for i in kept)
    assert abs(halves - 7500) < 5 * np.sqrt(30_000) / 4


def test_per_sample_and_scaled(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [80], 9, levels=9)
    assert run(*corpus.flags(), "--normalise", "sample") == corpus.twin(per="sample")
    assert run(*corpus.flags(), "--teacher-scale", 0.4) == corpus.twin(scale=0.4)
    assert run(*corpus.flags(), "--teacher-scale", 0.4) != corpus.twin()


def test_any_models_by_name(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [80], 9, levels=9)
    third = np.random.default_rng(1).normal(-3, 1, 80).astype(np.float32)
    write(tmp_path / "x", third, corpus.counts[0], dataset="d0", model="x")
    flags = ["--scores", f"r={tmp_path}/r-d0", f"t={tmp_path}/t-d0", f"x={tmp_path}/x", "--output", tmp_path / "o"]
    kept = run(*flags, "--weights", "r=0.3", "x=2", "t=-0.7", "--ratio", 0.25)[0]
    scores = scores_of([(0.3, corpus.reference[0]), (-0.7, corpus.teacher[0]), (2.0, third)], corpus.counts[0])
    ids = np.flatnonzero(corpus.counts[0])
    order = ordered(scores[ids], ids, ["d0"] * len(ids), 1234)
    assert kept == sorted(ids[order[: len(ids) // 4]].tolist())
    with pytest.raises(UsageError, match=r"--scores: \['r', 't', 'x'\], --weights: \['r'\]"):
        configure(*flags, "--weights", "r=1")


def test_equal_ratio_and_quota(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [40, 31, 50], 7, uniform=True)
    alone = [[0], [1], [2]]
    assert run(*corpus.flags(), "--allocation", "equal", "--ratio", 0.3) == corpus.twin(0.3, groups=alone)
    flags = [*corpus.flags(), "--allocation", "quota", "--quota", "out-d0=0.5", "out-d1=0.5"]
    kept = run(*flags, "out-d2=0", "--ratio", 0.4)
    assert [len(ids) for ids in kept] == [24, 24, 0]
    scores = corpus.scores()
    for dataset in (0, 1):
        order = ordered(scores[dataset], range(len(scores[dataset])), [f"d{dataset}"] * 99, 1234)
        assert kept[dataset] == sorted(order[:24])
    with pytest.raises(UsageError, match="1 in sum"):
        run(*flags, "--ratio", 0.4)


@pytest.mark.parametrize("of", ["samples", "tokens"])
def test_a_quota_that_is_more_than_there_is_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of: str
) -> None:
    corpus = Corpus(tmp_path, [40, 160], 7, uniform=True)  # four tokens each
    flags = [str(flag) for flag in corpus.flags()] + ["--allocation", "quota", "--ratio", "0.4", "--ratio-of", of]
    unit = 4 if of == "tokens" else 1
    assert main([*flags, "--quota", "out-d0=0.5", "out-d1=0.5"]) == 0
    assert "warning" not in capsys.readouterr().err
    for name in ("out-d0", "out-d1"):
        (tmp_path / name / "selection.json").unlink()
    assert main([*flags, "--quota", "out-d0=0.75", "out-d1=0.25"]) == 0
    told = f"out-d0: its quota is {60 * unit} {of}, there are {40 * unit}, kept are {40 * unit}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(8))
def test_floors_and_caps_are_the_clipped_threshold(tmp_path: Path, seed: int) -> None:
    """Against the definition: the one threshold t for which the clipped amounts sum to the budget."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 40, 4).tolist()
    corpus = Corpus(tmp_path, sizes, seed, levels=1000, uniform=True)
    floors, caps = rng.uniform(0, 0.4, 4).round(2), rng.uniform(0.5, 1, 4).round(2)
    low = [int(f * n + 1e-9) for f, n in zip(floors, sizes)]
    high = [int(c * n + 1e-9) for c, n in zip(caps, sizes)]
    budget = int(0.45 * sum(sizes))
    scores = corpus.scores()
    everything = sorted((float(s), d) for d in range(4) for s in scores[d])
    best = None
    for cut in range(len(everything) + 1):
        above = [sum(d == which for _, d in everything[cut:]) for which in range(4)]
        clipped = [min(max(a, lo), hi) for a, lo, hi in zip(above, low, high)]
        if sum(clipped) == budget:
            best = clipped
    names = [f"out-d{i}" for i in range(4)]
    bounds = [
        "--floor",
        *(f"{n}={f}" for n, f in zip(names, floors)),
        "--cap",
        *(f"{n}={c}" for n, c in zip(names, caps)),
    ]
    kept = run(*corpus.flags(), "--ratio", 0.45, *bounds)
    assert best is not None and [len(ids) for ids in kept] == best
    for dataset in range(4):
        assert kept[dataset] == sorted(np.argsort(-scores[dataset])[: best[dataset]].tolist())


def test_bounds_that_cannot_be_met(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [40, 40], 7, uniform=True)
    with pytest.raises(UsageError, match="between 32 and 80"):
        run(*corpus.flags(), "--ratio", 0.2, "--floor", "out-d0=0.8")
    with pytest.raises(UsageError, match="no such domain; there are out-d0, out-d1"):
        run(*corpus.flags(), "--cap", "web=0.8")


def test_rank_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks make the scale of the teacher's NLL immaterial; 2^20 bins are finer than neighbours here."""
    rng = np.random.default_rng(2)
    size, counts = 3000, np.full(3000, 4)
    teacher, reference = rng.normal(3, 0.5, size), rng.normal(3, 0.5, size)
    kept = []
    for scale in (1, 16):  # a power of two keeps the bins
        for kind, values in (("t", scale * teacher), ("r", reference)):
            write(tmp_path / kind, -4 * values, counts, model=kind)
        flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--output", tmp_path / "o"]
        kept.append(run(*flags, "--rank-difference")[0])
        plain = run(*flags)[0]
        ranks = [np.argsort(np.argsort(values)) / size for values in (reference, teacher)]
        exact = set(np.argsort(-(ranks[0] - ranks[1]))[: size // 2].tolist())
        assert len(exact & set(kept[-1])) > 0.995 * len(exact)
    assert len(set(kept[0]) & set(kept[1])) > 0.995 * len(kept[0])
    assert main([str(flag) for flag in (*flags[:-1], tmp_path / "said", "--rank-difference")]) == 0
    assert "ranks are of bins" in capsys.readouterr().out
    assert len(set(plain) & exact) < 0.9 * len(exact)  # at 16 times the scale the difference is the teacher's ranking


def test_excluded_samples(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [60], 3, levels=100)
    (tmp_path / "ids.txt").write_text("5\n17\n3\n3\n")
    np.save(tmp_path / "ids.npy", np.array([44, 5]))
    expected = corpus.twin(0.5, excluded={3, 5, 17, 44})
    assert run(*corpus.flags(), "--exclude-ids", tmp_path / "ids.txt", tmp_path / "ids.npy") == expected
    (first,) = run(*corpus.flags(), "--ratio", 0.3)
    flags = [*corpus.flags()[:-1], tmp_path / "rest", "--exclude-ids", tmp_path / "out-d0"]
    (rest,) = run(*flags, "--ratio", 0.5)
    assert not set(first) & set(rest) and [rest] == corpus.twin(0.5, excluded=set(first))
    parents = Selection(tmp_path / "rest").manifest.parents
    assert parents["excluded 0"] == Selection(tmp_path / "out-d0").fingerprint
    (tmp_path / "ids.txt").write_text("60\n")
    with pytest.raises(UsageError, match="sample id 60 of 60"):
        run(*corpus.flags(), "--exclude-ids", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("9" * 30)
    (tmp_path / "ids.npy").write_bytes(b"")
    for name in ("ids.txt", "ids.npy"):
        with pytest.raises(UsageError, match=f"{name}: .* expected one sample id in a line"):
            run(*corpus.flags(), "--exclude-ids", tmp_path / name)
    np.save(tmp_path / "ids.npy", np.zeros((2, 2), np.int64))
    with pytest.raises(UsageError, match=r"ids.npy: shape \(2, 2\), .* expected one axis of integers"):
        run(*corpus.flags(), "--exclude-ids", tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", np.zeros(0, np.int64))
    assert run(*corpus.flags(), "--exclude-ids", tmp_path / "ids.npy") == corpus.twin()
    np.save(tmp_path / "ids.npy", np.arange(60))
    with pytest.raises(UsageError, match="no sample to select from: all are excluded"):
        run(*corpus.flags(), "--exclude-ids", tmp_path / "ids.npy")


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_ids_are_sorted_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(select_sources, "_AT_ONCE", at_once)
    corpus = Corpus(tmp_path, [60], 9, levels=9)
    rng = np.random.default_rng(at_once)
    one, other = rng.integers(0, 60, 40), rng.integers(0, 60, 3)  # doubled ones among them
    (tmp_path / "one").write_text("".join(f"{i}{' ' if i % 3 else chr(10)}" for i in one))
    np.save(tmp_path / "other.npy", other.astype(np.uint16))
    flags = ["--exclude-ids", tmp_path / "one", tmp_path / "other.npy"]
    assert run(*corpus.flags(), *flags) == corpus.twin(excluded={*one.tolist(), *other.tolist()})
    pieces = [one, one[:0], other]
    assert select_sources.sort_unique(pieces).tolist() == sorted({*one.tolist(), *other.tolist()})


def test_scores_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    counts = np.full(70_000, 4)
    reference = np.random.default_rng(0).normal(-9, 1, 70_000)
    teacher = reference.copy()
    teacher[[66_001, 66_002, 69_000, 69_001, 69_002, 69_003]] = np.nan
    reference[7] = -np.inf
    write(tmp_path / "t", teacher, counts, model="t")
    write(tmp_path / "r", reference, counts, model="r")
    flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--output", tmp_path / "o"]
    with pytest.raises(CorruptError, match=r"7 samples .* ids 7, 66001, 66002, 69000, 69001, \.\.\."):
        run(*flags)
    assert not (tmp_path / "o").exists()
    (tmp_path / "bad").write_text("7 66001 66002 69000 69001 69002 69003")
    assert len(run(*flags, "--exclude-ids", tmp_path / "bad")[0]) == (70_000 - 7) // 2


def test_weights_that_are_too_large_are_at_fault_not_the_scores(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [60], 5)
    with pytest.raises(UsageError, match=r"--teacher-scale 1e\+39: .* beyond what float32 holds, ids \d+, .*, \.\.\.;"):
        run(*corpus.flags(), "--teacher-scale", 1e39)
    named = ["--scores", f"t={tmp_path}/t-d0", f"r={tmp_path}/r-d0", "--output", tmp_path / "o"]
    for extra in ([], ["--rank-difference"]):
        with pytest.raises(UsageError, match=r"--weights t=3e38 r=1: "):  # finite itself, but not with the scores
            run(*named, "--weights", "t=3e38", "r=1", *extra)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.001, float("nan")])
def test_ratios_that_mean_nothing(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio"):
        configure("--teacher-scores", "t", "--reference-scores", "r", "--output", tmp_path, "--ratio", ratio)


def test_ratio_one_keeps_all_candidates_and_a_tiny_one_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [50], 1)
    assert run(*corpus.flags(), "--ratio", 1) == [np.flatnonzero(corpus.counts[0]).tolist()]
    with pytest.raises(UsageError, match=r"--ratio 0\.001 .* keeps nothing"):
        run(*corpus.flags(), "--ratio", 0.001)
    ids = np.fromfile(tmp_path / "out-d0" / "ids.i64", "<i8")
    assert ids.tolist() == np.flatnonzero(corpus.counts[0]).tolist()  # still the old ones


def test_a_decimal_ratio_is_what_it_says(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [100], 1, levels=100, uniform=True)
    assert int(0.29 * 100) == 28  # floating point would lose a sample
    assert len(run(*corpus.flags(), "--ratio", 0.29)[0]) == 29


def test_degenerate_scores_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    counts, reference, teacher = np.full(500, 4), rng.normal(-12, 2, 500), rng.normal(-9, 2, 500)
    write(tmp_path / "r", reference, counts, model="r")
    write(tmp_path / "t", teacher, counts, model="t")
    flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--output", tmp_path / "o"]
    flags = [str(word) for word in flags]
    assert main(flags) == 0
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "o" / "selection.json").unlink()
    assert main([*flags, "--teacher-scale", "0.1"]) == 0
    figure = np.corrcoef(-reference / 4 + 0.1 * teacher / 4, -reference / 4)[0, 1]
    err = capsys.readouterr().err
    assert f"correlation {figure:.3f}" in err and "--teacher-scale (now 0.1)" in err and "--rank-difference" in err


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"dataset": "d1"}, "no scores of reference for dataset d0.* of dataset d1"),
    "sequence length": ({"seq_length": 9}, r"\(fingerprint .*\) has seq_length 7, .*\(fingerprint .*\) has 9"),
    "mask policy": ({"mask_policy": "skip_after_eod"}, "mask_policy all.* skip_after_eod"),
    "packing": ({"packing": "sentence"}, "packing concat"),
    "tokenizer": ({"tokenizer": {"type": "a", "hash": "22", "vocab_size": 9, "eod": 0}}, "tokenizers.* 11 .* 22 "),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_scores_are_refused(tmp_path: Path, name: str) -> None:
    other, message = FOREIGN[name]
    own = {"type": "a", "hash": "11", "vocab_size": 9, "eod": 0}
    values, counts = np.full(9, -3.0), np.full(9, 4)
    write(tmp_path / "t", values, counts, tokenizer=own)
    write(tmp_path / "r", values, counts, **{"tokenizer": own, **other})
    flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--output", tmp_path / "o"]
    with pytest.raises(MismatchError, match=message):
        run(*flags)


def test_scores_of_other_tokens_or_models_are_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [9, 9], 1)
    write(tmp_path / "t-d0", corpus.teacher[0], corpus.counts[0] + 1, dataset="d0", model="t")
    with pytest.raises(MismatchError, match=r"different tokens: counts\.i32"):
        run(*corpus.flags())
    write(tmp_path / "t-d0", corpus.teacher[0], corpus.counts[0], dataset="d0", model="u")
    with pytest.raises(MismatchError, match=r"of different models: .*t-d0 of u, .*t-d1 of t"):
        run(*corpus.flags())


def test_a_difference_of_the_same_scores_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [20], 1)
    with pytest.raises(UsageError, match="are the same scores"):
        run(*corpus.flags(), "--reference-scores", tmp_path / "t-d0")


def test_outputs_that_are_no_folders(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [20], 1)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", ""):
        with pytest.raises(UsageError, match="--output '.*': expected a folder"):
            run(*corpus.flags()[:-1], output)


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [40, 30], 5)
    run(*corpus.flags(), "--ratio", 0.3, "--teacher-scale", 0.5)
    manifest = Selection(tmp_path / "out-d1", expect_dataset="d1").manifest
    assert set(manifest.parents) == {"dataset", "scores teacher", "scores reference"}
    rule = manifest.parameters["rule"]
    assert rule["weights"] == {"reference": 1.0, "teacher": -0.5} and rule["datasets"] == ["d0", "d1"]
    domain = rule["domains"]["out-d1"]
    kept = Selection(tmp_path / "out-d1").ids
    assert domain["kept"] == len(kept) and domain["kept_tokens"] == int(corpus.counts[1][kept].sum())
    assert domain["candidates"] == int((corpus.counts[1] > 0).sum())
    scores = corpus.scores(0.5)
    assert domain["threshold"] == min(float(scores[d][Selection(tmp_path / f"out-d{d}").ids].min()) for d in (0, 1))
