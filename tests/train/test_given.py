"""What somebody asks for and would do nothing is refused; what a run writes down of itself is read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config.tree import dump, parse
from megakd.errors import UsageError
from megakd.train.config import TrainConfig

BASE = ["--data-path", "x", "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"]


def read(*words: str) -> TrainConfig:
    return parse(TrainConfig, [*BASE, *words], prog="megakd train", description="")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--kd-alpha 0.9", "--kd-alpha"),
        ("--kd-alpha 0.5", "--kd-alpha"),  # the default, and still asked for
        ("--kd-alpha 0.9 --kd-temperature 2", "--kd-alpha, --kd-temperature"),
        ("--kd-divergence reverse_kl", "--kd-divergence"),
        ("--objective.kd_alpha 0.9", "--kd-alpha"),
        ("--lm-weight 0.5", "--lm-weight"),
        ("--kd-divergence taid --taid-t-start 0.3", "--kd-divergence, --taid-t-start"),
        ("--kd-scale-by-temperature-squared", "--kd-scale-by-temperature-squared"),
    ],
)
def test_distillation_without_a_teacher(words: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"{named} without a teacher: .*--teacher-load DIR or --logits-load-dir DIR"):
        read(*words.split())
    assert read(*words.split(), "--teacher-load", "t").teacher.load == "t"
    assert read(*words.split(), "--logits-load-dir", "s").teacher.reads_stores


def test_a_parameter_of_another_divergence() -> None:
    with pytest.raises(
        UsageError, match="--kd-akl-mu is a parameter of adaptive_kl, and --kd-divergence is forward_kl"
    ):
        read("--kd-akl-mu", "0.7", "--teacher-load", "t")
    with pytest.raises(UsageError, match="of skew_forward_kl and skew_reverse_kl, .* choose --kd-divergence skew_for"):
        read("--kd-skew-alpha", "0.2", "--kd-divergence", "reverse_kl", "--teacher-load", "t")
    assert read("--kd-akl-mu", "0.7", "--kd-divergence", "adaptive_kl", "--teacher-load", "t").teacher.is_there


@pytest.mark.parametrize("text", ["objective: {kd_alpha: 0.5}", "objective: {kd_alpha: 0.9, kd_temperature: 2}"])
def test_distillation_in_a_file_without_a_teacher(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match="--kd-alpha.* without a teacher"):
        read("--config", str(tmp_path / "c.yaml"))
    assert read("--config", str(tmp_path / "c.yaml"), "--kd-alpha", "0").objective.kd_alpha == 0  # says so itself
    assert read("--config", str(tmp_path / "c.yaml"), "--teacher-load", "t").teacher.is_there


def test_what_a_plain_run_wrote_down_is_read_back(tmp_path: Path) -> None:
    for words in ([], ["--train-samples", "64", "--rampup-batch-size", "4", "2", "32"], ["--kd-alpha", "0"]):
        config = read(*words)
        (tmp_path / "config.yaml").write_text(dump(config))
        assert parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")], prog="p", description="") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--teacher-bf16", "--teacher-bf16 without a model as teacher: add --teacher-load DIR"),
        ("--teacher-iteration 3", "--teacher-iteration without a model as teacher"),
        ("--logits-load-prefetch-depth 4", "--logits-load-prefetch-depth without a store"),
        ("--train-iters 5 --train-samples 64", "--train-iters 5 and --train-samples 64 .8 steps. say one thing twice"),
        ("--train-iters 1000 --train-samples 64", "--train-iters 1000 and --train-samples 64"),
    ],
)
def test_other_things_that_would_do_nothing(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(*words.split())
