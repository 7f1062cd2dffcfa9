"""How long a run is: in samples, with batches that grow, until a time is over, and from a folder still empty."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import losses, make_config, make_tree, output_of_training, run_training, weights, write_dataset
from worlds import Worlds

from megakd.errors import UsageError
from megakd.train.preflight import check_run

RAMP = {"train_samples": 60, "micro_batch_size": 2, "rampup_batch_size": [4, 4, 20], "train_iters": 1000}
OPTIM = {"lr_warmup_samples": 12, "lr_decay_samples": 50, "lr_warmup_init": 1e-4, "min_lr": 1e-4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("length") / "data")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rate(samples: int) -> float:
    """A straight line up to 12 samples, then half a cosine down to 50; of the update after ``samples``."""
    if samples <= 12:
        return 1e-4 + (3e-3 - 1e-4) * samples / 12
    x = min((samples - 12) / 38, 1.0)
    return 1e-4 + (3e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * x))


@pytest.mark.slow
def test_a_ramp_counts_samples_and_continues_to_the_bit(data: str, world: Worlds, tmp_path: Path) -> None:
    def tree(name: str, **more: Any) -> dict[str, Any]:
        training = {**RAMP, **more, "global_batch_size": 12}
        return make_tree(data, training=training, optim=OPTIM, checkpoint={"save": str(tmp_path / name)})

    config = make_config(tree("whole"))
    assert config.training.train_iters == 7
    assert world(1).run(run_training, tree("whole")) == [0]
    found = records(tmp_path / "whole")
    ends = [4, 8, 12, 20, 32, 44, 56]  # levels of ten samples: 4 up to 10, 8 up to 20, then 12
    assert [record["samples"] for record in found] == ends
    assert [record["lr"] for record in found] == pytest.approx([rate(before) for before in [0, *ends[:-1]]])
    assert world(1).run(run_training, tree("cut", exit_interval=3)) == [75]
    assert world(1).run(run_training, tree("cut")) == [0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert weights_of(world, tmp_path / "cut") == weights_of(world, tmp_path / "whole")


def weights_of(world: Worlds, folder: Path) -> Any:
    return world(1).run(weights, str(folder), 7)[0]


@pytest.mark.slow
def test_two_ranks_take_the_samples_that_one_takes(data: str, world: Worlds, tmp_path: Path) -> None:
    for size in (1, 2):
        training = {**RAMP, "micro_batch_size": 1, "global_batch_size": 12, "train_samples": 24}
        tree = make_tree(data, training=training, optim=OPTIM, checkpoint={"save": str(tmp_path / str(size))})
        tree["optim"]["lr_decay_samples"] = None
        assert world(size).run(run_training, tree) == [0] * size
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    for step in one:
        assert one[step] == pytest.approx(two[step], rel=1e-5)


@pytest.mark.parametrize(
    ("optim", "training", "message"),
    [
        ({"lr_decay_samples": 5}, {}, "--lr-decay-samples 5 in a run of --train-iters"),
        ({"lr_warmup_iters": 1}, {"train_samples": 64}, "--lr-warmup-iters 1 in a run of --train-samples"),
        ({"lr_warmup_fraction": 0.5, "lr_warmup_iters": 1}, {}, "say one thing twice"),
        ({"lr_warmup_fraction": 1.0}, {}, "--lr-warmup-fraction is 1.0"),
        ({"lr_warmup_init": 1.0}, {}, "--lr-warmup-init is 1.0"),
        ({"lr_decay_style": "inverse-square-root"}, {}, "falls from the end of a warm-up"),
        ({"lr_warmup_samples": 64}, {"train_samples": 64}, "leaves nothing of the 64 decay samples"),
        ({"decoupled_min_lr": 0.1}, {}, "--decoupled-min-lr 0.1 without --decoupled-lr"),
        ({"decoupled_lr": -1.0}, {}, "--decoupled-lr -1.0"),
        ({}, {"train_samples": 7}, "--train-samples 7 is less than one step"),
        ({}, {"train_samples": 64, "train_iters": 9}, "64 .8 steps. say one thing twice"),
        ({}, {"rampup_batch_size": [4, 4]}, "expected three numbers, START INCREMENT SAMPLES"),
        ({}, {"exit_duration_in_mins": 0.0}, "--exit-duration-in-mins is 0.0"),
    ],
)
def test_lengths_that_do_not_fit(optim: dict[str, Any], training: dict[str, Any], message: str, data: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(make_tree(data, optim=optim, training=training))


@pytest.mark.slow
def test_embeddings_and_head_learn_at_a_rate_of_their_own(data: str, world: Worlds, tmp_path: Path) -> None:
    """One step at rate 0 of everything else moves the two alone."""
    moved = {}
    for name, optim in {"own": {"decoupled_lr": 1e-2}, "plain": {}}.items():
        tree = make_tree(data, optim={"lr": 1e-30, **optim}, training={"train_iters": 2})
        tree["checkpoint"] = {"save": str(tmp_path / name), "save_interval": 1}
        tree["optim"]["lr_decay_style"] = "constant"
        assert world(1).run(run_training, tree) == [0]
        first, second = (world(1).run(weights, str(tmp_path / name), step)[0] for step in (1, 2))
        moved[name] = {key for key in first if key.split(".")[0] in ("decoder", "embedding", "output_layer")
                       and first[key] != second[key]}  # fmt: skip
    assert not moved["plain"]
    assert moved["own"] == {"embedding.word_embeddings.weight", "output_layer.weight"}


def test_a_run_ends_when_its_time_is_over(data: str, world: Worlds, tmp_path: Path) -> None:
    tree = make_tree(data, training={"train_iters": 500, "exit_duration_in_mins": 1e-6})
    tree["checkpoint"] = {"save": str(tmp_path / "run")}
    assert world(2).run(run_training, tree) == [75, 75]
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


@pytest.mark.slow
def test_load_from_where_nothing_is_saved_yet(data: str, world: Worlds, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    tree = make_tree(data, training={"train_iters": 1}, checkpoint={"save": run, "load": f"{run}/"})
    for change, message in (
        ({"exit_on_missing_checkpoint": True}, "--load: folder .*run does not exist"),
        ({"finetune": True}, "--load: folder"),
        ({"load": str(tmp_path / "rum")}, "--load: folder .*rum does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            check_run(make_config(make_tree(data, checkpoint={**tree["checkpoint"], **change})), 1)
    assert "holds no checkpoint yet: weights come from --seed" in world(1).run(output_of_training, tree)[0]
    tree["training"]["train_iters"] = 2
    assert "continues after iteration 1" in world(1).run(output_of_training, tree)[0]
