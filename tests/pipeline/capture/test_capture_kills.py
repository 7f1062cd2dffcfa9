"""capture under kill -9: the same bytes in the end, and never half a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline.frozen.frozen_kills import FrozenVerb, files
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

NUM_SHARDS = 40


def call_main(argv: list[str]) -> int:
    from megakd.pipeline.capture.main import main

    return main(argv)


@pytest.fixture(scope="module")
def verb(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> FrozenVerb:
    """A teacher, a dataset of a few seconds, and its store and scores by a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("capture-kills")
    data = write_dataset(folder / "data", num_tokens=30_000)
    tree = make_tree(data, training={"train_iters": 1}, checkpoint={"save": str(folder / "model")})
    assert world(1).run(run_training, tree) == [0]
    flags = ["--load", str(folder / "model"), "--data-path", data, "--seq-length", "16", "--top-k", "30"]
    flags += ["--shard-samples", str(-(-30_000 // 16 // NUM_SHARDS)), "--log-interval", "0.2"]

    def run(output: Path) -> int:
        status: int
        (status,) = world(1).run(call_main, [*flags, "--output", str(output)])
        return status

    assert run(folder / "whole") == 0
    whole: dict[str, Any] = files(folder / "whole")
    return FrozenVerb("capture", flags, run, whole, "shards", "store.json", NUM_SHARDS)


@pytest.mark.slow
def test_bytes_after_five_kills(verb: FrozenVerb, tmp_path: Path) -> None:
    verb.kill_and_rerun(tmp_path / "s", 5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_bytes_after_twenty_kills(verb: FrozenVerb, tmp_path: Path) -> None:
    verb.kill_and_rerun(tmp_path / "s", 20)
