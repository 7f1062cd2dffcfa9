"""A report's numbers are plain numpy's over the whole arrays, and its page lets no text become markup."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.report.report_corpus import Corpus, Page
from pipeline.select.select_twin import write

from megakd.__main__ import run
from megakd.data.indexed.dataset import IndexedWriter
from megakd.data.scores.artefact import Scores
from megakd.data.tokenizer import ByteTokenizer
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.report import main as report
from megakd.pipeline.report import plots as report_plots
from megakd.pipeline.report import scoring as report_scoring
from megakd.pipeline.report.figures import Column, images
from megakd.pipeline.report.main import TABLES, main


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_scoring, "_AT_ONCE", 17)
    monkeypatch.setattr(report, "draw", lambda *_: {})  # a second for each report


def numbers(rows: list[dict[str, str]], *names: str) -> Any:
    return np.array([[float(row[name]) for name in names] for row in rows]).T


def top(corpus: Corpus, scores: Any, ratio: float) -> set[int]:
    """Ids of the largest, of scores without ties at the cut."""
    order = np.argsort(-scores, kind="stable")
    size = int(ratio * len(scores))
    assert scores[order[size - 1]] > scores[order[size]]
    return set(corpus.ids[order[:size]].tolist())


@pytest.mark.parametrize("packing", ["concat", "sentence"])
def test_figures_are_numpy_s(tmp_path: Path, packing: str) -> None:
    corpus = Corpus(tmp_path, packing)
    kept = np.isin(corpus.ids, corpus.select("--ratio", 0.4, "--teacher-scale", 0.7))
    tables = corpus.report("--selection", tmp_path / "kept", "--data-path", tmp_path / "data", "--bins", 9)
    columns, tokens = corpus.columns(0.7), corpus.counts[corpus.ids]
    scores = columns["score"].astype(np.float64)

    low, high, samples, mass, kept_samples = numbers(
        tables["scores"], "score_from", "score_to", "samples", "tokens", "kept_samples"
    )
    edges = np.append(low, high[-1])
    assert edges[0] == scores.min() and edges[-1] == scores.max() and (low[1:] == high[:-1]).all()
    assert samples.tolist() == np.histogram(scores, edges)[0].tolist()
    assert mass.tolist() == np.histogram(scores, edges, weights=tokens)[0].tolist()
    assert kept_samples.tolist() == np.histogram(scores[kept], edges)[0].tolist()

    at, above, tokens_above, kept_above = numbers(
        tables["cumulative"], "score", "samples_share_above", "tokens_share_above", "kept_share_above"
    )
    for place, edge in enumerate(at[:-1]):
        assert above[place] == (scores >= edge).mean()
        assert tokens_above[place] == tokens[scores >= edge].sum() / tokens.sum()
        assert kept_above[place] == (scores[kept] >= edge).mean()

    x, y = columns["NLL of the teacher"].astype(float), columns["NLL of the reference"].astype(float)
    cells = numbers(tables["nll"], "teacher_from", "teacher_to", "reference_from", "reference_to", "samples").T
    assert cells[:, 4].sum() == len(x)
    last = max(x.max(), y.max())
    for a, b, c, d, size in cells:
        in_x, in_y = (x >= a) & ((x < b) | (b == last)), (y >= c) & ((y < d) | (d == last))
        assert (in_x & in_y).sum() == size

    starts = corpus.dataset.pointers // 2
    of_document = np.searchsorted(starts, corpus.samples.starts(corpus.ids), side="right") - 1
    for which, lengths in (("scored tokens of the sample", tokens), (
        "tokens of the document it starts in", corpus.dataset.lengths[of_document]
    )):  # fmt: skip
        rows = [row for row in tables["lengths"] if row["length"] == which]
        assert sum(int(row["samples"]) for row in rows) == len(scores)
        for row in rows:
            own = (lengths >= int(row["from"])) & (lengths <= int(row["to"]))
            assert int(row["samples"]) == own.sum() and float(row["kept_share"]) == kept[own].mean()
            assert float(row["kept_token_share"]) == tokens[own & kept].sum() / tokens[own].sum()

    largest = [row for row in tables["extremes"] if row["end"] == "largest"]
    order = np.lexsort((corpus.ids, -scores))[:10]
    assert [int(row["sample"]) for row in largest] == corpus.ids[order].tolist()
    assert [np.float32(row["score"]) for row in largest] == columns["score"][order].tolist()
    smallest = [int(row["sample"]) for row in tables["extremes"] if row["end"] == "smallest"]
    assert smallest == corpus.ids[np.lexsort((corpus.ids, scores))[:10]].tolist()


def ranks(values: Any) -> Any:
    """Mean ranks, by comparing each with each."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def test_ranks_of_ties_are_their_mean() -> None:
    column, values = Column(), np.array([2, -1, 2, 0.5, -0.0, 0, 2, -1, 8], np.float32)
    column.add(values[:4])
    column.add(values[4:])
    assert column.ranks()[images(values)].tolist() == (ranks(values) - 4).tolist()


def test_two_scorings_compared(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, seed=4)
    columns = corpus.columns()
    noise = np.random.default_rng(9).normal(0, 1e-3, (2, len(corpus.counts))) * corpus.counts  # no ties at the cut
    for name, each in zip("ro", noise):
        corpus.log_probs[name] += each.astype(np.float32)
        write(tmp_path / name, corpus.log_probs[name], corpus.counts, model=name, **corpus.told)
    columns = corpus.columns()
    tables = corpus.report("--other-reference-scores", tmp_path / "o", "--ratio", 0.3)
    first, other = (top(corpus, columns[name], 0.3) for name in ("score", "other score"))
    (row,) = tables["agreement"]
    n = len(corpus.ids)
    found = [int(row[key]) for key in ("both_keep", "only_first_keeps", "only_other_keeps", "neither_keeps")]
    assert found == [len(first & other), len(first - other), len(other - first), n - len(first | other)]
    assert float(row["agreement"]) == (found[0] + found[3]) / n and 0 < len(first - other) < n
    assert len(tables["correlations"]) == 6
    for row in tables["correlations"]:
        one, two = (columns[row[key]].astype(np.float64) for key in ("one", "other"))
        assert float(row["pearson"]) == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-9)
        # ranks are of the first 20 bits of a float: neighbours within 2^-11 of each other may tie
        assert float(row["spearman"]) == pytest.approx(np.corrcoef(ranks(one), ranks(two))[0, 1], abs=2e-3)


def test_by_domain(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    (tmp_path / "domains").write_text("a$b$ 0 11\n<i> 20 40\n")
    domains = ["--data-path", tmp_path / "data", "--domains", tmp_path / "domains"]
    kept = corpus.select("--allocation", "equal", "--ratio", 0.5, *domains)
    tables = corpus.report("--selection", tmp_path / "kept", *domains)
    starts = corpus.dataset.pointers // 2
    scores = dict(zip(corpus.ids.tolist(), corpus.columns()["score"].tolist()))
    own: dict[str, list[int]] = {"a$b$": [], "<i>": [], "other": []}
    for i in corpus.ids.tolist():
        # a sample is of the domain that its first token is in
        document = int(np.searchsorted(starts, corpus.samples.starts(np.array([i]))[0], side="right")) - 1
        own["a$b$" if document < 11 else "<i>" if 20 <= document < 40 else "other"].append(i)
    assert {row["domain"] for row in tables["domains"]} == set(own)
    for row in tables["domains"]:
        ids = own[row["domain"]]
        assert int(row["samples"]) == len(ids) and int(row["kept_samples"]) == len(ids) // 2
        assert float(row["kept_token_share"]) == pytest.approx(
            corpus.counts[[i for i in ids if i in kept]].sum() / corpus.counts[ids].sum()
        )
        assert float(row["mean_score"]) == pytest.approx(np.mean([scores[i] for i in ids]))
    assert b"<td>&lt;i&gt;</td>" in (tmp_path / "out" / "report.html").read_bytes()


def test_diversity_is_a_count_of_tuples(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    kept = corpus.select("--ratio", 1)
    tables = corpus.report("--selection", tmp_path / "kept", "--data-path", tmp_path / "data")
    assert kept == corpus.ids.tolist()
    rows = corpus.samples.read(corpus.ids).tolist()
    for n in (1, 2, 3, 4):
        ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        for of in ("all", "kept"):
            (row,) = [r for r in tables["diversity"] if (r["n"], r["samples_of"]) == (str(n), of)]
            assert (int(row["ngrams"]), int(row["distinct"])) == (len(ngrams), len(set(ngrams)))
    drawn = corpus.report("--data-path", tmp_path / "data", "--diversity-samples", 5)["diversity"]
    assert {row["samples"] for row in drawn} == {"5"}


def test_the_page_stands_alone_and_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", report_plots.draw)
    corpus = Corpus(tmp_path)
    corpus.report("--data-path", tmp_path / "data", "--extremes", 10)
    source = (tmp_path / "out" / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags and page.tags.count("img") == 4 == len(page.links)
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert not re.search(r"https?:|url\(|@import", source)
    sample = ByteTokenizer().decode(corpus.samples.read(np.array([1]))[0].tolist())
    shown = sample.replace("\u202e", "\\u202e").replace("\x07", "\\u0007")
    assert any(c in sample for c in "<>&") and shown in page.text  # it is the one with the smallest score
    assert "\u202e" not in source and "\x07" not in source
    for name in ("scores", "cumulative", "nll", "lengths"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "domains.png").exists() and "By domain" not in page.text  # there is one alone
    assert "negative log-likelihood (NLL) under the reference minus the teacher's, in nats a token" in page.text


def test_the_same_bytes_again_and_nothing_left_over(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    rich = ["--data-path", tmp_path / "data", "--other-reference-scores", tmp_path / "o"]
    corpus.report(*rich)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {f"{name}.csv" for name in TABLES} | {"report.html", "report.json"} <= set(first)
    corpus.report(*rich)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    corpus.report("--extremes", 0)
    left = {path.stem for path in (tmp_path / "out").glob("*.csv")}
    assert left == set(TABLES) - {"agreement", "diversity", "extremes"}


def test_blocks_change_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(tmp_path)
    several = corpus.report()
    monkeypatch.setattr(report_scoring, "_AT_ONCE", 1 << 18)
    whole = corpus.report()
    for name in ("scores", "cumulative", "nll", "lengths", "extremes"):
        assert several[name] == whole[name]


def test_all_of_one_value(tmp_path: Path) -> None:
    for name in "tr":
        write(tmp_path / name, np.full(9, -8.0), np.full(9, 4), model=name)
    flags = ["--teacher-scores", str(tmp_path / "t"), "--reference-scores", str(tmp_path / "r")]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "correlations.csv").open() as stream:
        assert [row["pearson"] for row in csv.DictReader(stream)] == [""] * 3
    with (tmp_path / "out" / "scores.csv").open() as stream:
        assert [(row["samples"], row["kept_samples"]) for row in csv.DictReader(stream)] == [("9", "4")]


def test_foreign_inputs_are_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    out = ["--output", tmp_path / "out"]
    write(tmp_path / "x", corpus.log_probs["r"], corpus.counts, model="x", **{**corpus.told, "dataset": "another"})
    foreign = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "x", *out]
    with pytest.raises(MismatchError, match=f"(?s){corpus.dataset.fingerprint}.*another"):
        main([str(word) for word in foreign])
    assert run(main, [str(word) for word in foreign]) == 4
    with pytest.raises(MismatchError, match=f"(?s){corpus.dataset.fingerprint}.*another"):
        main(corpus.flags(*out, "--other-reference-scores", tmp_path / "x"))
    corpus.select()
    others = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "o", *out]
    fingerprints = [Scores(tmp_path / name).fingerprint for name in "ro"]
    with pytest.raises(MismatchError, match=f"{fingerprints[1]}.*{fingerprints[0]}"):
        main([str(word) for word in (*others, "--selection", tmp_path / "kept")])
    write(tmp_path / "s", corpus.log_probs["r"], corpus.counts, model="s", **{**corpus.told, "mask_policy": "other"})
    with pytest.raises(MismatchError, match="mask_policy all.*mask_policy|mask_policy"):
        main(corpus.flags(*out, "--other-reference-scores", tmp_path / "s"))
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_with_its_ids(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    bad = corpus.ids[[3, 20, 25]]
    corpus.log_probs["r"][bad] = [np.nan, np.inf, np.nan]
    write(tmp_path / "r", corpus.log_probs["r"], corpus.counts, model="r", **corpus.told)
    with pytest.raises(CorruptError, match=f"not finite: ids {bad[0]}; .*--exclude-ids"):
        corpus.report()
    assert run(main, corpus.flags("--output", tmp_path / "out")) == 5
    assert not list((tmp_path / "out").glob("*.csv"))
    (tmp_path / "bad").write_text("\n".join(map(str, bad)))
    tables = corpus.report("--exclude-ids", tmp_path / "bad")
    assert sum(int(row["samples"]) for row in tables["scores"]) == len(corpus.ids) - 3
    with pytest.raises(UsageError, match=r"--teacher-scale 1e\+39: .* beyond what float32 holds"):
        corpus.report("--exclude-ids", tmp_path / "bad", "--teacher-scale", 1e39)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--bins", "1"], "--bins 1"),
        (["--domains", "x"], "--data-path"),
        (["--normalise", "byte"], "--data-path"),
        (["--extremes", "-1"], "--extremes -1"),
    ],
)
def test_flags_that_cannot_work(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(["--teacher-scores", "t", "--reference-scores", "r", "--output", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("size, kept", [(1, 0), (2, 1), (3, 1)])
def test_a_sample_or_two(tmp_path: Path, size: int, kept: int) -> None:
    for place, name in enumerate("tr"):
        write(tmp_path / name, -np.arange(1, size + 1) * (1.0 + place), np.ones(size), model=name)
    flags = ["--teacher-scores", str(tmp_path / "t"), "--reference-scores", str(tmp_path / "r")]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "domains.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["samples"], row["kept_samples"]) == (str(size), str(kept))


def test_a_dataset_that_records_no_tokenizer(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.arange(70) + 40, np.array([70], np.int32))
        told = {"dataset": writer.finish().fingerprint, "seq_length": 30}
    for place, name in enumerate("tr"):
        write(tmp_path / name, [-30.0, -60 - 9.0 * place], [30, 30], model=name, **told)
    flags = ["--teacher-scores", tmp_path / "t", "--reference-scores", tmp_path / "r", "--data-path", tmp_path / "data"]
    words = [str(word) for word in (*flags, "--output", tmp_path / "out")]
    with pytest.raises(UsageError, match="--tokenizer-type"):
        main(words)
    assert main([*words, "--tokenizer-type", "ByteTokenizer"]) == 0
    assert "FGHIJKLMNOPQRSTUVWXYZ" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_to_report_on(tmp_path: Path) -> None:
    for name in "tr":
        write(tmp_path / name, np.zeros(3), np.zeros(3), model=name)
    flags = ["--teacher-scores", str(tmp_path / "t"), "--reference-scores", str(tmp_path / "r")]
    with pytest.raises(UsageError, match="no sample with anything scored"):
        main([*flags, "--output", str(tmp_path / "out")])
