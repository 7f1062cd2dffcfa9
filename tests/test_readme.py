"""The README's commands and configuration are read as a user would give them: flags exist, shapes and layouts fit."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megakd.__main__ import VERBS
from megakd.config.tree import from_dict, parse, validate
from megakd.errors import ExitStatus
from megakd.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def train_commands() -> list[list[str]]:
    """The words of every ``torchrun ... megakd train ...`` in the README."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.S | re.M)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if "megakd train" in line]


def configuration() -> str:
    """The README's YAML file."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M)
    return str(text)


def check(config: TrainConfig, world_size: int) -> None:
    validate(config)
    shape = config.student.resolve("student")
    shape.check_layout(config.parallel, "student")
    config.training.check_batch(config.parallel.data_parallel_size(world_size))
    if config.teacher.load is not None:
        config.teacher_parallel().data_parallel_size(world_size)


@pytest.mark.parametrize("words", train_commands(), ids=lambda words: " ".join(words[:8]))
def test_train_commands(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    file.write_text(configuration())
    launcher, flags = words[: words.index("megakd")], words[words.index("train") + 1 :]
    world_size = 1
    for name, value in itertools.pairwise(launcher):
        world_size *= int(value) if name in ("--nnodes", "--nproc-per-node") else 1
    flags = [str(file) if word == "student.yaml" else word for word in flags]
    check(parse(TrainConfig, flags, prog="megakd train", description=""), world_size)


def test_readme_has_train_commands() -> None:
    assert len(train_commands()) >= 3


def test_configuration() -> None:
    check(from_dict(TrainConfig, yaml.safe_load(configuration())), world_size=8)


def test_verbs_and_statuses_are_named() -> None:
    assert not [verb for verb in VERBS if verb not in README]
    table = dict(re.findall(r"^\| (\d+) \| ([^|]*) \|$", (ROOT / "docs" / "promises.md").read_text(), re.M))
    assert {int(status) for status in table} == {int(status) for status in ExitStatus}


def test_readme_can_be_read_in_one_go() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert not [line for line in lines if len(line) > 160 and not line.startswith(("|", "!["))]
