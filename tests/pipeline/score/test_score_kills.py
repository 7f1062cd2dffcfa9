"""score under kills, signals and other jobs on the same output: the same bytes in the end, and never half a file."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.frozen.frozen_kills import FrozenVerb, Process, files
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.scores.artefact import Scores
from megakd.errors import ExitStatus


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, a dataset of a few seconds, and its scores by a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("score-kills")
    data = write_dataset(folder / "data", num_tokens=30_000)
    tree = make_tree(data, training={"train_iters": 1}, checkpoint={"save": str(folder / "model")})
    assert world(1).run(run_training, tree) == [0]
    flags = ["--load", str(folder / "model"), "--data-path", data, "--seq-length", "16"]
    flags += ["--range-samples", "50", "--per-token-log-probs", "--log-interval", "0.2"]
    made: dict[str, Any] = {"flags": flags, "world": world(1)}
    assert run(made, folder / "whole") == 0
    made["whole"] = files(folder / "whole")
    num_ranges = -(-len(made["whole"]["counts.i32"]) // 4 // 50)
    whole = partial(run, made)
    made["verb"] = FrozenVerb("score", flags, whole, made["whole"], "parts", "scores.json", num_ranges)
    return made


def run(made: dict[str, Any], output: Path, *flags: str) -> int:
    """The command in a process that has loaded torch already, for where nothing must happen to it."""
    status: int
    (status,) = made["world"].run(call_main, [*made["flags"], "--output", str(output), *flags])
    return status


def call_main(argv: list[str]) -> int:
    from megakd.pipeline.score.main import main

    return main(argv)


def finish(process: Process) -> tuple[int, str]:
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


@pytest.mark.slow
def test_bytes_after_five_kills(made: dict[str, Any], tmp_path: Path) -> None:
    made["verb"].kill_and_rerun(tmp_path / "s", 5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_bytes_after_twenty_kills(made: dict[str, Any], tmp_path: Path) -> None:
    made["verb"].kill_and_rerun(tmp_path / "s", 20)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_bytes_after_twenty_kills_among_three_jobs(made: dict[str, Any], tmp_path: Path) -> None:
    """Jobs come and go, and while one is killed the others go on."""
    rng = random.Random(3)
    folder = tmp_path / "s"
    jobs = [made["verb"].start(folder, "--range-samples", "7") for _ in range(3)]
    for kill in range(20):
        made["verb"].wait_for_parts(jobs[0], folder, kill * 5 + 1)
        time.sleep(rng.uniform(0, 0.1))
        victim = jobs.pop(rng.randrange(3))
        victim.kill()
        finish(victim)
        jobs.append(made["verb"].start(folder, "--range-samples", "7"))
    assert [finish(job)[0] for job in jobs] == [0, 0, 0]
    assert run(made, tmp_path / "alone", "--range-samples", "7") == 0
    assert files(folder) == files(tmp_path / "alone")


@pytest.mark.slow
def test_two_jobs_at_once(made: dict[str, Any], tmp_path: Path) -> None:
    job = made["verb"].start(tmp_path / "s")
    made["verb"].wait_for_parts(job, tmp_path / "s", 1)
    assert run(made, tmp_path / "s") == 0
    status, errors = finish(job)
    assert status == 0, errors
    assert files(tmp_path / "s") == made["whole"]


@pytest.mark.slow
def test_sigterm_finishes_the_range_and_the_same_command_continues(made: dict[str, Any], tmp_path: Path) -> None:
    process = made["verb"].start(tmp_path / "s")
    made["verb"].wait_for_parts(process, tmp_path / "s", 3)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == ExitStatus.STOPPED and "the same command continues" in errors
    done = made["verb"].num_parts(tmp_path / "s")
    assert done >= 3 and not list((tmp_path / "s" / "parts").glob("*.lock"))
    (tmp_path / "s" / "parts" / "00000099.part.tmp").write_bytes(b"of a run that was killed")
    status, errors = finish(made["verb"].start(tmp_path / "s"))
    assert status == 0 and f"continuing: {done * 50} of" in errors
    assert "tokens/s" in errors and " left)" in errors
    assert files(tmp_path / "s") == made["whole"]
    assert run(made, tmp_path / "s") == 0
    assert files(tmp_path / "s") == made["whole"]


@pytest.mark.slow
def test_what_is_left_of_a_finish_that_was_killed(made: dict[str, Any], tmp_path: Path) -> None:
    """Whole scores with parts still there; and parts with some arrays but no manifest."""
    for name, data in made["whole"].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "00000003.part").write_bytes(b"")
    (tmp_path / "finish.lock").write_bytes(b"")
    assert run(made, tmp_path) == 0
    assert files(tmp_path) == made["whole"] and not (tmp_path / "parts").exists()
    (tmp_path / "scores.json").unlink()
    (tmp_path / "log_probs.f32").write_bytes(b"half")
    (tmp_path / "counts.i32.tmp").write_bytes(b"half")
    assert run(made, tmp_path) == 0
    assert files(tmp_path) == made["whole"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], marks=pytest.mark.long),
        pytest.param(["--tensor-model-parallel-size", "2"], marks=pytest.mark.long),
        pytest.param(["--pipeline-model-parallel-size", "2"], marks=pytest.mark.long),
    ],
)
def test_signal_to_one_rank_of_two(layout: list[str], made: dict[str, Any], tmp_path: Path) -> None:
    """The ranks of one copy stop together; the launcher then ends the other copies."""
    folder = tmp_path / "s"
    launcher = made["verb"].start(folder, *layout, ranks=2)
    made["verb"].wait_for_parts(launcher, folder, 3)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    status, errors = finish(launcher)
    assert status != 0 and "exitcode  : 75" in errors, errors
    done = made["verb"].num_parts(folder)
    if not (folder / "scores.json").exists():  # a copy of its own may be done before the launcher gets to it
        assert 3 <= done < made["verb"].num_ranges
        status, errors = finish(made["verb"].start(folder, *layout, ranks=2))
        assert status == 0, errors
    if not layout:
        assert files(folder) == made["whole"]
    else:
        whole = np.frombuffer(made["whole"]["log_probs.f32"], "<f4")
        assert np.abs(Scores(folder).log_probs / whole - 1).max() < 1e-5
