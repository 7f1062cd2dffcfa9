"""Alpha and the temperature over a run: each shape against its formula, runs that are cut, extended or changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import build_parts, make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.errors import UsageError
from megakd.train.config import OptimConfig
from megakd.train.objective.config import ObjectiveConfig
from megakd.train.objective.schedule import SHAPES, KDSchedule, Phases, Schedule, make_schedule, schedule_help

PHASES = Phases(end=100, warmup=10, decay=20, decay_style="linear")


def make(shape: Any, high: float = 0.9, low: float = 0.1, **changes: Any) -> Schedule:
    return make_schedule(shape, high, low, **{"end": 50, "period": 8, "phases": PHASES, **changes})


def twin_wsd(step: int) -> float:
    finished = step - 1
    if finished <= 10:
        return 0.1 + 0.8 * finished / 10
    if finished <= 80:
        return 0.9
    return 0.9 - 0.8 * (finished - 80) / 20 if finished <= 100 else 0.1


TWINS: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.9,
    "linear_up": lambda step: 0.1 + 0.8 * step / 50 if step <= 50 else 0.9,
    "linear_down": lambda step: 0.9 - 0.8 * step / 50 if step <= 50 else 0.1,
    "cosine": lambda step: 0.5 + 0.4 * math.cos(math.pi * step / 50) if step <= 50 else 0.1,
    "periodic": lambda step: 0.5 + 0.4 * math.cos(2 * math.pi * (step - 1) / 8),
    "wsd": twin_wsd,
    "wsd_beta": lambda step: 1.0 - twin_wsd(step),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    schedule = make(shape)
    for step in range(1, 131):
        assert schedule.at(step) == pytest.approx(TWINS[shape](step), abs=1e-12), step


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    low=st.floats(0, 1),
    span=st.floats(0, 1),
    step=st.integers(1, 10**6),
    end=st.integers(1, 10**5),
    period=st.integers(2, 1000),
    warmup=st.integers(0, 1000),
    decay=st.integers(1, 1000),
    style=st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"]),
)
def test_values_stay_between_their_ends(shape: Any, low: float, span: float, step: int, **told: Any) -> None:
    phases = Phases(told["warmup"] + told["decay"] + told["end"], told["warmup"], told["decay"], told["style"])
    high = low + span
    value = make_schedule(shape, high, low, end=told["end"], period=told["period"], phases=phases).at(step)
    assert low - 1e-12 <= value <= high + 1e-12


def test_ends_are_exact() -> None:
    """A teacher is left out where alpha is 0, not where it is 1e-17."""
    assert make("linear_down", 0.7, 0.0).at(50) == 0 and make("cosine", 0.7, 0.0).at(50) == 0
    assert make("wsd", 0.7, 0.0).at(101) == 0 and make("wsd", 0.7, 0.3).at(40) == 0.7
    assert make("wsd_beta", 0.7, 0.0).at(40) == 0 and make("periodic", 0.7, 0.0).at(5) == 0
    for style in ("linear", "cosine", "exponential", "minus_sqrt"):
        assert make("wsd", 0.7, 0.0, phases=Phases(100, 10, 20, style)).at(101) == 0  # type: ignore[arg-type]


class Holder:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_alpha_is_the_learning_rate(style: Any) -> None:
    """With one WSD for both, alpha over its largest is the rate over its largest, step by step."""
    from megakd.train.lr_schedule import build_lr_schedule, set_rate

    optim = OptimConfig(
        lr=2.0, lr_decay_style="WSD", lr_warmup_iters=7, lr_wsd_decay_iters=30, lr_wsd_decay_style=style
    )
    alpha = ObjectiveConfig(kd_alpha=0.8, kd_alpha_schedule="wsd").schedule(100, optim.phases(100)).alpha
    rate = build_lr_schedule(optim, Holder(), train_iters=100)
    for step in range(1, 121):
        assert alpha.at(step) / 0.8 == pytest.approx(set_rate(rate, step - 1) / 2.0, abs=1e-12)


def test_defaults_of_a_run() -> None:
    phases = OptimConfig(lr_warmup_iters=20).phases(300)
    schedule = ObjectiveConfig(kd_alpha_schedule="periodic", kd_temperature_schedule="linear_down", kd_temperature=4.0)
    made = schedule.schedule(300, phases)
    assert made.alpha == Schedule("periodic", 0.5, 0.0, period=30)
    assert made.temperature == Schedule("linear_down", 4.0, 1.0, end=300)
    wsd = ObjectiveConfig(kd_alpha_schedule="wsd").schedule(300, phases).alpha
    assert wsd == Schedule("wsd", 0.5, 0.0, end=300, warmup=20, decay=30, decay_style="minus_sqrt")
    assert ObjectiveConfig().schedule(300, phases) == ObjectiveConfig(kd_schedule_iters=9).schedule(7, phases)


def test_changes_are_told() -> None:
    one = KDSchedule(make("constant"), make("constant", 1.0))
    other = KDSchedule(make("linear_up"), make("constant", 1.0), lm_weight=1.0)
    state = json.loads(json.dumps(one.state_dict()))
    assert one.changes(state) == [] and other.changes({}) == []
    alpha, lm = other.changes(state)
    assert alpha == "alpha: constant 0.9 there, linear_up 0.9 low 0.1 end 50 here"
    assert lm == "lm_weight: 1 - alpha there, 1.0 here"


def test_evaluation_has_one_alpha_and_temperature() -> None:
    from megakd.losses.head import KDTerm, VocabShard
    from megakd.train.objective.objective import Objective

    schedule = KDSchedule(make("linear_down"), make("cosine", 4.0, 1.0))
    objective = Objective(0.9, KDTerm(temperature=4.0), VocabShard(0, 8, 8, None), False, schedule=schedule)
    now, held_out = objective.at(25), objective.held_out().at(25)
    assert now.term is not None and held_out.term is not None
    assert (now.alpha, now.term.temperature) == (pytest.approx(0.5), pytest.approx(2.5))
    assert (held_out.alpha, held_out.term.temperature) == (0.9, 4.0)


def test_help_has_a_line_for_every_shape() -> None:
    lines = schedule_help()
    assert [line.split()[0] for line in lines if line[2] != " "] == list(SHAPES)
    assert max(map(len, lines)) <= 118


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"kd_alpha_min": 0.2}, "--kd-alpha-min 0.2 is for a schedule"),
        (
            {"kd_alpha_schedule": "cosine", "kd_alpha": 0.5, "kd_alpha_min": 0.6},
            "--kd-alpha 0.5 and --kd-alpha-min 0.6",
        ),
        ({"kd_alpha_schedule": "cosine", "kd_alpha_min": -0.1}, "expected 0 <= min <= alpha"),
        ({"kd_temperature_schedule": "cosine", "kd_temperature": 0.5}, "--kd-temperature-min 1.0; expected 0.001"),
        ({"kd_temperature_schedule": "cosine", "kd_temperature_min": 0.0}, "expected 0.001 <= min"),
        ({"lm_weight": -1.0}, "--lm-weight is -1.0"),
        ({"lm_weight": 0.0, "kd_alpha_schedule": "wsd"}, "where alpha is 0 there is nothing to train on"),
        ({"kd_schedule_iters": 0}, "--kd-schedule-iters is 0"),
        ({"kd_schedule_period": 1}, "--kd-schedule-period is 1"),
        ({"kd_temperature_mode": "entropy"}, "add --kd-temperature-on teacher"),
        (
            {"kd_temperature_mode": "logit_std", "kd_temperature_on": "teacher", "kd_divergence": "taid"},
            "mixes logits of one temperature",
        ),
        (
            {"kd_temperature_mode": "entropy", "kd_temperature_on": "teacher", "kd_temperature_uncertain": 0.0},
            "--kd-temperature-uncertain is 0.0",
        ),
    ],
)
def test_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig(**told).validate()


def test_phases_must_fit_whatever_the_learning_rates_style() -> None:
    tree = make_tree(
        "x",
        teacher={"load": "y"},
        objective={"kd_alpha_schedule": "wsd"},
        training={"train_iters": 10},
        optim={"lr_decay_style": "cosine", "lr_warmup_iters": 6, "lr_wsd_decay_iters": 5},
    )
    with pytest.raises(UsageError, match="--lr-warmup-iters 6 \\+ --lr-wsd-decay-iters 5 exceed"):
        make_config(tree)
    make_config({**tree, "objective": {}})


class CountingTeacher:
    """A teacher that counts the microbatches it is asked about."""

    def __init__(self, teacher: Any) -> None:
        self._teacher, self.asked = teacher, 0

    def targets(self, batch: Any) -> Iterator[Any]:
        for targets in self._teacher.targets(batch):
            self.asked += 1
            yield targets


def asked_of_the_teacher(tree: dict[str, Any], steps: int) -> list[tuple[int, dict[str, Any]]]:
    """For each of the first steps, how often the teacher was asked, and what the step says."""
    from megakd.parallel import init_parallel
    from megakd.teachers.protocol import NoTeacher
    from megakd.train.preflight import check_run
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, 1)
    groups = init_parallel(config.parallel, seed=5)
    student, uncounted, objective, batches = build_parts(config, plan, groups)
    teacher, found = CountingTeacher(uncounted), []
    for step in range(1, steps + 1):
        teacher.asked = 0
        current = objective.at(step)
        asked = teacher if current.needs_teacher else NoTeacher()
        loss = run_step(student, next(batches), asked, current, groups, step=step)
        found.append((teacher.asked, loss.__dict__))
    return found


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("schedules")
    data, teacher = write_dataset(folder / "data"), str(folder / "teacher")
    tree = make_tree(data, training={"train_iters": 10}, checkpoint={"save": teacher}, optim={"lr": 1e-2})
    assert world(1).run(run_training, tree) == [0]
    return {"data": data, "teacher": teacher}


@pytest.mark.slow
def test_the_teacher_rests_where_alpha_is_0(setting: dict[str, Any], world: Worlds) -> None:
    """Four microbatches a step; alpha is 0.6, 0.3 and then 0. Rho-1 asks the teacher all the same."""
    objective = {"kd_alpha": 0.9, "kd_alpha_schedule": "linear_down", "kd_schedule_iters": 3, "lm_weight": 0.75}
    tree = make_tree(setting["data"], teacher={"load": setting["teacher"]}, objective=objective)
    plain = world(1).run(asked_of_the_teacher, make_tree(setting["data"]), 4)[0]
    found = world(1).run(asked_of_the_teacher, tree, 4)[0]
    assert [asked for asked, _ in found] == [4, 4, 0, 0]
    for (_, loss), alpha in zip(found, (0.6, 0.3, 0.0, 0.0)):
        assert loss["alpha"] == pytest.approx(alpha, abs=1e-12) and loss["lm_weight"] == 0.75
        assert loss["loss"] == pytest.approx(0.75 * loss["lm"] + alpha * (loss["kd"] or 0.0), rel=1e-6)
        assert (loss["kd"] is None) == (loss["temperature"] is None) == (alpha == 0)
    assert found[3][1]["lm"] == plain[3][1]["lm"] and plain[3][1]["alpha"] is None
    tree["objective"] |= {"rho_keep": 0.5, "kd_entropy_gate": 0.2}
    chosen = world(1).run(asked_of_the_teacher, tree, 4)[0]
    assert [asked for asked, _ in chosen] == [4, 4, 4, 4]
    assert chosen[3][1]["num_tokens"] == plain[3][1]["num_tokens"] // 2 and chosen[3][1]["kd"] is None


KEYS = ("loss", "lm_loss", "kd_loss", "alpha", "lm_weight", "temperature", "grad_norm", "lr")


def record(folder: Path) -> list[list[float | None]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(key) for key in KEYS] for line in lines if "loss" in line]


def run_tree(setting: dict[str, Any], save: Path, **training: Any) -> dict[str, Any]:
    return make_tree(
        setting["data"],
        training={"train_iters": 10, **training},
        teacher={"load": setting["teacher"], "pipeline_model_parallel_size": 1},
        objective={
            "kd_alpha": 0.9,
            "kd_alpha_schedule": "wsd",
            "kd_temperature": 3.0,
            "kd_temperature_schedule": "cosine",
        },
        optim={"lr_decay_style": "WSD", "lr_warmup_iters": 3, "lr_wsd_decay_iters": 4},
        checkpoint={"save": str(save)},
        parallel={"pipeline_model_parallel_size": 2},
    )


@pytest.mark.slow
def test_a_cut_run_continues_to_the_bit(setting: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    """Cut while alpha decays. Another schedule is taken from there on."""
    whole, cut, changed = tmp_path / "whole", tmp_path / "cut", tmp_path / "changed"
    assert set(world(2).run(run_training, run_tree(setting, whole))) == {0}
    found = record(whole)
    assert [row[3] for row in found] == pytest.approx(
        [0.0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.9, 0.45, 0.9 * (1 - math.sqrt(0.5)), 0.9 * (1 - math.sqrt(0.75))]
    )
    assert [row[4] for row in found] == pytest.approx([1 - (row[3] or 0.0) for row in found])
    assert [row[5] for row in found[1:]] == pytest.approx([2 + math.cos(math.pi * s / 10) for s in range(2, 11)])
    assert found[0][2] is None and found[0][5] is None
    assert set(world(2).run(run_training, run_tree(setting, cut, exit_interval=8))) == {75}
    shutil.copytree(cut, changed)
    assert set(world(2).run(run_training, run_tree(setting, cut))) == {0}
    assert record(cut) == found
    tree = run_tree(setting, changed)
    tree["objective"] |= {"kd_alpha_schedule": "constant"}
    assert set(world(2).run(run_training, tree)) == {0}
    assert record(changed)[:8] == found[:8] and [row[3] for row in record(changed)[8:]] == [0.9] * 2
    manifest = json.loads((cut / "iter_0000008" / "manifest.json").read_text())
    assert manifest["parameters"]["objective_state"]["schedule"]["alpha"]["shape"] == "wsd"


@pytest.mark.slow
def test_an_extended_run_goes_on_with_the_longer_schedule(
    setting: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    """As its learning rate does; --kd-schedule-iters keeps a schedule as it was."""
    objective = {"kd_alpha": 0.8, "kd_alpha_schedule": "linear_down"}
    for name, told, expected in (
        ("longer", {}, [0.8 - 0.8 * step / 4 for step in (1, 2)] + [0.8 - 0.8 * step / 6 for step in (3, 4, 5, 6)]),
        ("kept", {"kd_schedule_iters": 4}, [0.6, 0.4, 0.2, 0.0, 0.0, 0.0]),
    ):
        for steps, stop in ((4, 2), (6, None)):
            tree = make_tree(
                setting["data"],
                training={"train_iters": steps, "exit_interval": stop},
                teacher={"load": setting["teacher"]},
                objective=objective | told,
                checkpoint={"save": str(tmp_path / name)},
            )
            world(1).run(run_training, tree)
        assert [row[3] for row in record(tmp_path / name)] == pytest.approx(expected)
