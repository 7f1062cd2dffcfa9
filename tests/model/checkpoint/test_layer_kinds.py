"""Checkpoints of one kind of layers in the other kind: Transformer Engine's norms have an extra state, local ones none.

The norms here are local ones with an extra state of the same name and type; all else of Transformer Engine's names is
the local layers' own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline.score.score_runs import run_score
from runs import losses, make_tree, one_step, run_training, weights, write_dataset
from torch import Tensor
from worlds import Worlds

from megakd.data.scores.artefact import Scores

KINDS = ("local", "engine")
STATE = torch.tensor([7, 1], dtype=torch.uint8)


class _Kind:
    """Layers of a kind, for as long as a ``with`` block lasts: "engine" gives norms an extra state."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        from megakd.model import gpt

        self._norm = gpt.RMSNorm

        class EngineNorm(gpt.RMSNorm):
            def get_extra_state(self) -> Tensor:
                return STATE.clone()

            def set_extra_state(self, state: Tensor) -> None:
                assert torch.equal(state, STATE), state

        if self._kind == "engine":
            gpt.RMSNorm = EngineNorm  # type: ignore[misc]

    def __exit__(self, *_: object) -> None:
        from megakd.model import gpt

        gpt.RMSNorm = self._norm  # type: ignore[misc]


def train_with(kind: str, tree: dict[str, Any]) -> int:
    with _Kind(kind):
        return run_training(tree)


def objects(folder: Path) -> set[str]:
    from megakd.model.checkpoint.record import read_record
    from megakd.model.checkpoint.tensor_names import read_tensor_names

    return {name for name in read_tensor_names(read_record(folder).path) if "norm._extra_state" in name}


def step_with(kind: str, tree: dict[str, Any]) -> dict[str, Any]:
    with _Kind(kind):
        return one_step(tree)


def score_with(kind: str, tree: dict[str, Any]) -> int:
    with _Kind(kind):
        return run_score(tree)


def _tree(folder: Path, run: Path, **training: Any) -> dict[str, Any]:
    settings = {"train_iters": 3, **training}
    return make_tree(str(folder / "data"), training=settings, checkpoint={"save": str(run)})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> Path:
    """A folder with runs of two steps of three, and the data of all: ``local``, ``engine``, and ``whole`` of both."""
    folder = tmp_path_factory.mktemp("kinds")
    write_dataset(folder / "data")
    for kind in KINDS:
        world(1).run(train_with, kind, _tree(folder, folder / kind, exit_interval=2))
    world(1).run(run_training, _tree(folder, folder / "whole"))
    assert not objects(folder / "local")
    assert len(objects(folder / "engine")) == 2 * 4 + 1  # q and k of each layer, and the last one
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), [KINDS, KINDS[::-1]])
def test_a_run_resumes(writer: str, reader: str, written: Path, tmp_path: Path, world: Worlds) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / writer, run)
    world(1).run(train_with, reader, _tree(written, run))
    assert losses(run) == losses(written / "whole")
    assert bool(objects(run)) == (reader == "engine")
    assert world(1).run(weights, str(run), 3) == world(1).run(weights, str(written / "whole"), 3)


@pytest.mark.slow
@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("reader", KINDS)
def test_a_run_starts_from_it(writer: str, reader: str, written: Path, tmp_path: Path, world: Worlds) -> None:
    """A student by ``--finetune`` and a teacher, in one step of theirs."""
    tree = _tree(written, tmp_path / "run")
    tree["checkpoint"] |= {"load": str(written / writer), "finetune": True}
    tree["teacher"] = {"load": str(written / writer)}
    (step,) = world(1).run(step_with, reader, tree)
    assert step["agreement"] == 1 and step["kd"] == pytest.approx(0, abs=1e-6), step


@pytest.mark.slow
def test_scores_are_equal(written: Path, tmp_path: Path, world: Worlds) -> None:
    scores = []
    for writer in KINDS:
        for reader in KINDS:
            output = tmp_path / f"{writer}-{reader}"
            tree = {"load": str(written / writer), "data_path": str(written / "data"), "seq_length": 16}
            assert world(1).run(score_with, reader, tree | {"output": str(output)}) == [0]
            scores.append(np.asarray(Scores(output).log_probs))
    assert len(scores[0]) > 100 and all(np.array_equal(scores[0], array) for array in scores[1:])
