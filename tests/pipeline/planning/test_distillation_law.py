"""The distillation scaling law: the paper's figures, its limits, constants found again, and the plans made of it."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from megakd.__main__ import run
from megakd.errors import ExitStatus, MismatchError, UsageError
from megakd.pipeline.planning import main as plan
from megakd.pipeline.planning.distillation_fit import Runs, fit_distillation, read_runs
from megakd.pipeline.planning.distillation_law import PUBLISHED, law_as_dict, read_law

N, D = 546e6, 160 * 546e6
TEACHERS = (2.7e9, 4.8e9, 7.75e9)


def run_plan(*arguments):
    return run(plan.main, [str(argument) for argument in arguments])


def teacher_loss(size):
    return PUBLISHED.alone.loss(size, 20 * size)


def twin(parameters, tokens, teacher):
    """The formula once more, as it is printed."""
    alone = 1.220 + (3355 / parameters**0.408 + 18186 / tokens**0.431) ** 0.452
    short = (2243 / parameters**0.321 + 24181 / tokens**0.637) ** 0.764
    return teacher + teacher**-2.549 * (1 + (teacher / (alone * 1.315)) ** (1 / 0.090)) ** (-522.6 * 0.090) * short


def test_the_capacity_gap():
    """A student of 546M on 160 tokens a parameter: a teacher of 4.8B is better for it than a larger and a smaller one
    (each trained on 20 tokens a parameter)."""
    found = [PUBLISHED.loss(N, D, teacher_loss(size)) for size in TEACHERS]
    assert [round(loss, 3) for loss in found] == [2.305, 2.296, 2.298]
    for size in TEACHERS:
        assert PUBLISHED.loss(N, D, teacher_loss(size)) == pytest.approx(twin(N, D, teacher_loss(size)), rel=1e-12)
    assert PUBLISHED.loss(N, 3e9, 5.0) == pytest.approx(twin(N, 3e9, 5.0), rel=1e-9)


def test_limits():
    law = PUBLISHED
    assert law.alone.loss(1e60, math.inf) == pytest.approx(1.220, abs=1e-9)
    assert law.alone.loss(N, math.inf) == pytest.approx(law.alone.loss(N, 1e30), rel=1e-6)
    assert law.loss(1e40, math.inf, 2.0) == pytest.approx(2.0, abs=1e-6), "a student of any capacity copies its teacher"
    assert law.loss(N, math.inf, 2.0) > law.alone.loss(N, math.inf), "with all the data alone is better"
    losses = [law.loss(N, tokens, 2.1) for tokens in np.geomspace(1e8, 1e12, 30)]
    assert losses == sorted(losses, reverse=True)


def test_best_teacher_and_winning_range_equal_a_scan():
    law, tokens = PUBLISHED, D
    scan = min(np.linspace(1.3, 4, 20001), key=lambda loss: law.loss(N, tokens, loss))
    assert law.best_teacher_loss(N, tokens) == pytest.approx(scan, abs=2e-4)
    for size in TEACHERS:
        low, high = law.winning_range(N, teacher_loss(size))
        grid = np.geomspace(1e7, 1e15, 4001)
        wins = grid[[law.loss(N, at, teacher_loss(size)) < law.alone.loss(N, at) for at in grid]]
        assert low == 0 and wins[0] == grid[0] and high == pytest.approx(wins[-1], rel=0.006)
    assert law.winning_range(N, 2.1, lambda tokens: 1000 * tokens + 1e12) is None
    paid = law.winning_range(1e9, teacher_loss(4.8e9), lambda tokens: tokens + 2e10)  # at few tokens alone is better
    assert 1e6 < paid[0] < paid[1] < math.inf
    for edge, inside in ((paid[0], 1.01), (paid[1], 0.99)):
        gains = [
            law.alone.loss(1e9, t + 2e10) - law.loss(1e9, t, teacher_loss(4.8e9))
            for t in (edge * inside, edge / inside)
        ]
        assert gains[0] > 0 > gains[1]


def make_runs(noise=0.0):
    rows = [(n, each * n, PUBLISHED.alone.loss(n, each * n), math.nan)
            for n in (143e6, 300e6, 546e6, 1.2e9, 2.7e9) for each in (10, 30, 100, 300)]  # fmt: skip
    rows += [(n, tokens, PUBLISHED.loss(n, tokens, teacher_loss(size)), teacher_loss(size))
             for n in (143e6, 300e6, 546e6, 1.2e9) for tokens in (4e9, 16e9, 64e9, 256e9)
             for size in (546e6, 1.8e9, 4.8e9, 7.75e9)]  # fmt: skip
    runs = Runs(*np.array(rows).T)
    noisy = runs.loss_n * np.exp(noise * np.random.default_rng(0).standard_normal(len(rows)))
    return dataclasses.replace(runs, loss_n=noisy)


@pytest.mark.slow
def test_a_law_is_found_from_its_own_points():
    """All fifteen constants; through noise of a thousandth its predictions, of a student larger than any seen too."""
    fit = fit_distillation(make_runs())
    assert np.abs(fit.alone_residuals_n).max() < 1e-10 and np.abs(fit.distilled_residuals_n).max() < 1e-10
    for name in ("parameters_scale", "tokens_scale", "outer_exponent", "c0", "c1", "f1", "d1"):
        assert getattr(fit.law, name) == pytest.approx(getattr(PUBLISHED, name), rel=1e-4), name
    for name, value in dataclasses.asdict(PUBLISHED.alone).items():
        assert getattr(fit.law.alone, name) == pytest.approx(value, rel=1e-4), name
    noisy = make_runs(1e-3)
    noisy.loss_n[[3, 40]] *= 1.3  # two bad runs weigh little
    found = fit_distillation(noisy).law
    for size, tokens, teacher in ((N, D, 2.1), (200e6, 1e11, 2.4), (2e9, 1e11, 2.0)):
        assert found.loss(size, tokens, teacher) == pytest.approx(PUBLISHED.loss(size, tokens, teacher), rel=3e-3)


def write_runs(path, runs):
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["teacher_loss", "loss", "parameters", "tokens"])
        for n, tokens, loss, teacher in zip(runs.parameters_n, runs.tokens_n, runs.loss_n, runs.teacher_loss_n):
            writer.writerow(["" if math.isnan(teacher) else teacher, loss, n, tokens])
    return path


@pytest.mark.slow
def test_fit_write_and_plan_with_it(tmp_path, capsys):
    path, out, asked = write_runs(tmp_path / "runs.csv", make_runs()), tmp_path / "out", ["--distill", "546M"]
    asked += ["--distill-teacher", "2.7B", "4.8B", "--distill-tokens", D]
    assert run_plan("--distill-fit", path, "--output", out) == ExitStatus.COMPLETE
    assert "fitted to 20 runs alone and 64 distilled" in capsys.readouterr().out
    found = read_law(out / "distillation_law.json")
    assert found.c0 == pytest.approx(PUBLISHED.c0) and found.source.startswith("fitted to 20")
    assert run_plan("--distill-law", out / "distillation_law.json", *asked) == ExitStatus.COMPLETE
    text = capsys.readouterr().out
    assert "2.3048" in text and "do not transfer" not in text


def test_a_plan(tmp_path, capsys):
    """FLOPs by hand: 6 N_S D_S, and 2 N_T D_S where the teacher runs along, and 6 N_T D_T shared by two students."""
    asked = ["--distill", "546M", "--distill-tokens", D, "--distill-teacher", "2.7B", "7.75B", "--output", tmp_path]
    told = [
        "--distill-teacher-tokens",
        1e11,
        "--distill-students",
        2,
        "--distill-teacher-loss",
        2.2,
        teacher_loss(7.75e9),
    ]
    assert run_plan(*asked, *told) == ExitStatus.COMPLETE
    text = capsys.readouterr().out
    assert "do not transfer" in text and "arXiv 2502.08606" in text
    written = json.loads((tmp_path / "plan.json").read_bytes())["distillation"]
    (student,) = written["students"]
    small, large = student["pairs"]
    assert large["loss"] == pytest.approx(2.2975, abs=1e-4) and small["teacher"]["loss"] == 2.2
    own = 6 * N * D
    expected = [own, own + 2 * 7.75e9 * D, own + 2 * 7.75e9 * D + 6 * 7.75e9 * 1e11 / 2]
    for account, flops in zip(large["accounts"], expected):
        assert account["flops"] == pytest.approx(flops)
        assert account["alone_loss"] == pytest.approx(PUBLISHED.alone.loss(N, flops / (6 * N)))
    assert large["accounts"][0]["wins"][1] == pytest.approx(PUBLISHED.winning_range(N, teacher_loss(7.75e9))[1])
    assert (
        student["alone_loss"] == pytest.approx(2.3317, abs=1e-4) and not (tmp_path / "distillation_law.json").exists()
    )


def test_sizes_of_presets_are_counted_without_embeddings(capsys):
    assert run_plan("--distill", "miniplm-200m", "--distill-teacher-loss", 2.5, "--distill-tokens", 1e10) == 0
    text = capsys.readouterr().out
    projection = 151936 * 768
    alone = float(re.search(r"### miniplm-200m on 1e\+10 tokens: ([\d.]+) alone", text)[1])
    assert alone == pytest.approx(PUBLISHED.alone.loss(203.4e6 - projection, 1e10), abs=1e-3)
    assert abs(alone - PUBLISHED.alone.loss(203.4e6, 1e10)) > 0.1 and "it runs along" not in text


def test_help_tells_of_it(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--distill ", "--distill-teacher-loss", "--distill-fit", "--distill-law"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--distill-teacher", "1B"], "--distill-teacher without --distill"),
        (["--distill-law", "x.json"], "--distill-law without --distill"),
        (["--distill", "200M"], "--distill without a teacher"),
        (["--distill", "200M", "--distill-teacher", "1B", "--distill-teacher-loss", "2", "3"], "2 for 1 teachers"),
        (["--distill", "200M", "--distill-teacher", "1B", "--distill-teacher-tokens", "2", "3"], "2 for 1 teachers"),
        (["--distill", "200M", "--distill-teacher-loss", "-2"], "--distill-teacher-loss .-2.0.: expected positive"),
        (["--distill", "200M", "--distill-teacher", "1B", "--distill-students", "0"], "--distill-students 0"),
        (["--distill", "200M", "--distill-teacher", "1B", "--distill-law", "none.json"], "none.json: No such file"),
        (["--distill-fit", "none.csv"], "--distill-fit none.csv"),
        (["--distill-fit", "x.csv", "--distill-huber-delta", "0"], "--distill-huber-delta 0"),
    ],
)
def test_flags_refused(flags, message, capsys):
    assert run_plan(*flags) == ExitStatus.USAGE
    assert re.search(message, capsys.readouterr().err)


def test_files_refused(tmp_path):
    runs = make_runs()
    with pytest.raises(UsageError, match="0 distilled runs; expected at least 12"):
        fit_distillation(runs[~runs.distilled_n])
    with pytest.raises(UsageError, match="0 runs alone .* expected at least 8"):
        fit_distillation(runs[runs.distilled_n])
    with pytest.raises(UsageError, match="fewer than 3 different values of tokens"):
        fit_distillation(dataclasses.replace(runs, tokens_n=np.full(84, 1e9)))
    (tmp_path / "a.csv").write_text("parameters,tokens,loss\n1,2,3\n")
    with pytest.raises(UsageError, match="no column teacher_loss"):
        read_runs([str(tmp_path / "a.csv")])
    (tmp_path / "b.csv").write_text("parameters,tokens,loss,teacher_loss\n1e8,2e9,much,\n")
    with pytest.raises(UsageError, match="line 2: loss is 'much'"):
        read_runs([str(tmp_path / "b.csv")])
    law = tmp_path / "law.json"
    whole = law_as_dict(PUBLISHED)
    law.write_text(json.dumps(whole))
    assert read_law(law) == PUBLISHED
    for change, error, message in (
        ({"version": 2}, MismatchError, "version 2"),
        ({"format": "x"}, UsageError, "no megakd-distillation-law"),
        ({"c1": "many"}, UsageError, "c1 is 'many'"),
        ({"alone": {**whole["alone"], "floor": None}}, UsageError, "floor is None"),
    ):
        law.write_text(json.dumps({**whole, **change}))
        with pytest.raises(error, match=message):
            read_law(law)
    law.write_text("[")
    with pytest.raises(UsageError, match="not JSON"):
        read_law(law)
