"""The page of a report: every sample accounted for, nothing shown twice, and what ``select`` said of its selection."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from pipeline.report.report_corpus import SEQ, Corpus, Page
from pipeline.select.select_twin import write

from megakd.data.selection import Selection
from megakd.errors import MismatchError
from megakd.pipeline.report import main as report
from megakd.pipeline.report import plots as report_plots


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})  # a second for each report


def drawn(figures: Any, tables: Any) -> dict[str, Any]:
    """The labels of what each plot shows, as people read them."""
    matplotlib.use("Agg")
    found: dict[str, Any] = {}
    plots = {
        "scores": lambda axes: report_plots._scores(axes, figures, "token"),
        "cumulative": lambda axes: report_plots._cumulative(axes, figures, tables["cumulative"], "token"),
        "nll": lambda axes: report_plots._nll(axes, figures, "token"),
    }
    for name, plot in plots.items():
        figure, axes = pyplot.subplots()
        plot(axes)
        found[name] = ([text.get_text() for text in axes.get_legend().get_texts()], axes.get_xlabel(), axes.get_xlim())
        pyplot.close(figure)
    return found


def test_no_sample_is_off_a_plot_without_a_count_and_no_curve_lies_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(report, "draw", lambda figures, tables, per: seen.append((figures, tables)) or {})
    corpus = Corpus(tmp_path, "sentence")
    corpus.report("--bins", 20)
    columns = corpus.columns()
    scores = columns["score"]
    labels = drawn(*seen[0])
    assert labels["cumulative"][0] == ["samples, tokens (alike)", "kept samples"]
    for name in ("scores", "cumulative"):
        below, above = map(int, re.findall(r"(\d+) (?:samples below|above)", labels[name][1]))
        edges = seen[0][0].score_edges
        assert (below, above) == ((scores < edges[1]).sum(), (scores >= edges[-2]).sum()) and below > 0
    (outside,) = map(int, re.findall(r"outside of the plot: (\d+) samples", labels["nll"][1]))
    low, high = labels["nll"][2]
    both = np.stack([columns["NLL of the teacher"], columns["NLL of the reference"]])
    assert outside == (~((both >= low) & (both < high)).all(axis=0)).sum()

    corpus.counts[:] = np.where(corpus.counts > 0, SEQ, 0)  # of one length all, so tokens are as samples
    for name, values in corpus.log_probs.items():
        write(tmp_path / name, values, corpus.counts, model=name, **corpus.told)
    corpus.report("--ratio", 1)
    assert drawn(*seen[1])["cumulative"][0] == ["samples, tokens, kept samples (alike)"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By length" not in page and "nan" not in page


def test_the_page_tells_what_select_warned_of_and_how_it_selected(tmp_path: Path, capsys: Any) -> None:
    corpus = Corpus(tmp_path)
    (tmp_path / "domains").write_text("few 0 2\nmany 2 51\n")
    domains = ["--data-path", tmp_path / "data", "--domains", tmp_path / "domains"]
    corpus.select("--allocation", "quota", "--quota", "few=0.8", "many=0.2", "--teacher-scale", 25, *domains)
    warned = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]
    assert len(warned) == 2 and warned[0].startswith("few: its quota is")
    corpus.report("--selection", tmp_path / "kept", "--data-path", tmp_path / "data")  # without --domains
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    for warning in warned:
        assert f"Warning: {warning}" in text
    assert "{" not in text.split("Extremes")[0], "raw JSON on the page"
    assert "by quota" in text and "quota few=0.8 many=0.2" in text and "teacher -25" in text
    # the domains of the selection, by select's names
    rows = list(csv.DictReader((tmp_path / "out" / "domains.csv").open()))
    rule = Selection(tmp_path / "kept").manifest.parameters["rule"]["domains"]
    assert {row["domain"]: int(row["kept_samples"]) for row in rows} == {name: rule[name]["kept"] for name in rule}


def test_select_and_report_name_a_dataset_alike(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.select()
    for folder in ("kept", "moved"):
        if folder == "moved":
            (tmp_path / "kept").rename(tmp_path / "moved")
        assert [row["domain"] for row in corpus.report("--selection", tmp_path / folder)["domains"]] == ["kept"]


def test_scores_that_looked_at_end_of_document_ids_alone_are_told(tmp_path: Path, capsys: Any) -> None:
    """Both made before the index was looked at: a warning; one of either kind: refused."""
    corpus = Corpus(tmp_path)
    for name in "tr":
        write(tmp_path / name, corpus.log_probs[name], corpus.counts, model=name, **corpus.told, mask_policy="reset")
    corpus.select()
    assert "by end-of-document ids alone" in capsys.readouterr().err
    corpus.report("--selection", tmp_path / "kept")
    assert "by end-of-document ids alone" in (tmp_path / "out" / "report.html").read_text()
    told = {**corpus.told, "mask_policy": "reset", "boundaries": "index"}
    write(tmp_path / "r", corpus.log_probs["r"], corpus.counts, model="r", **told)
    with pytest.raises(MismatchError, match="boundaries None.*has index"):
        corpus.select()
