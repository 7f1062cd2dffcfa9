"""A run that was cut anywhere goes on as if nothing had happened: to the bit in its layout, within fp32 in another."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from no_gpu import HIDDEN
from runs import losses, make_tree, run_training, weights, write_dataset
from worlds import Worlds

from megakd.artefacts.manifest import hash_file, read_manifest, write_manifest

TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("resume") / "data", num_tokens=40000)


def torchrun(tree: dict[str, Any], folder: Path, size: int) -> subprocess.Popen[str]:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["-m", "megakd", "train", "--config", str(config)]
    env = os.environ | HIDDEN | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def wait_for_step(folder: Path, step: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and step in losses_so_far(folder):
            return
        if run.poll() is not None:
            raise AssertionError(f"the run ended early:\n{run.stdout.read() if run.stdout else ''}")
        time.sleep(0.005)
    raise AssertionError("the run does not get on")


def losses_so_far(folder: Path) -> set[int]:
    steps = set()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            steps.add(json.loads(line)["step"])
    return steps


def slow_tree(data: str, save: Path, **groups: dict[str, Any]) -> dict[str, Any]:
    """Steps of about a tenth of a second, so that a signal hits one."""
    training = {"train_iters": 20, "global_batch_size": 16, "micro_batch_size": 2}
    checkpoint = {"save": str(save), "save_interval": 10}
    return make_tree(data, training=training, checkpoint=checkpoint, data={"seq_length": 64}, **groups)


GROUPS: dict[str, dict[str, Any]] = {"parallel": {**TP2}, "student": {"hidden_dropout": 0.1}}


@pytest.fixture(scope="module")
def whole(data: str, world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing cuts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert world(2).run(run_training, slow_tree(data, folder, **GROUPS)) == [0, 0]
    return folder


@pytest.mark.slow
def test_kill_of_one_rank_and_resume_change_no_bit(data: str, whole: Path, world: Worlds, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    run = torchrun(slow_tree(data, cut, **GROUPS), tmp_path, 2)
    wait_for_step(cut, 13, run)
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 4, "two ranks, each with the process for its checkpoint's results"
    killed_at = time.monotonic()
    os.kill(workers(run)[1], signal.SIGKILL)
    assert run.wait(timeout=200) != 0
    assert time.monotonic() - killed_at < 100, "the death of a rank must be noticed long before a collective's timeout"
    _, alive = psutil.wait_procs(family, timeout=100)
    assert not alive, "nothing may outlive the run"
    assert (cut / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert 20 not in losses(cut), "the kill came too late to test anything"
    assert world(2).run(run_training, slow_tree(data, cut, **GROUPS)) == [0, 0]
    assert losses(cut) == losses(whole)
    assert world(1).run(weights, str(cut), 20) == world(1).run(weights, str(whole), 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "then"),
    [
        ((2, {**TP2}), (1, {})),
        ((2, {**TP2}), (2, {"pipeline_model_parallel_size": 2})),
        ((2, {"use_distributed_optimizer": True}), (1, {"use_distributed_optimizer": True})),
        pytest.param(
            (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
            (2, {**TP2}),
            marks=pytest.mark.long,
        ),
        pytest.param(
            (2, {"use_distributed_optimizer": True, **TP2}),
            (4, {"use_distributed_optimizer": True, "pipeline_model_parallel_size": 2}),
            marks=pytest.mark.long,
        ),
    ],
)
def test_resume_in_another_layout(
    start: tuple[int, dict[str, Any]], then: tuple[int, dict[str, Any]], data: str, world: Worlds, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training = {"train_iters": 12}

    def tree(save: Path, parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
        checkpoint = {"save": str(save), "save_interval": 6}
        return make_tree(data, training={**training, **more}, checkpoint=checkpoint, parallel=parallel)

    assert set(world(start[0]).run(run_training, tree(whole, start[1]))) == {0}
    assert set(world(start[0]).run(run_training, tree(cut, start[1], exit_interval=6))) == {75}
    assert set(world(then[0]).run(run_training, tree(cut, then[1]))) == {0}
    expected, found = losses(whole), losses(cut)
    assert sorted(found) == list(range(1, 13))
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


def test_samples_are_counted_through_a_change_of_batch(data: str, world: Worlds, tmp_path: Path) -> None:
    for steps, batch in ((2, 8), (4, 16)):
        training = {"train_iters": steps, "global_batch_size": batch}
        tree = make_tree(data, training=training, checkpoint={"save": str(tmp_path / "run")})
        assert world(1).run(run_training, tree) == [0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines] == [8, 16, 32, 48]


@pytest.mark.slow
def test_background_save_equals_foreground(data: str, world: Worlds, tmp_path: Path) -> None:
    for name, background in (("now", False), ("later", True)):
        checkpoint = {"save": str(tmp_path / name), "save_interval": 3, "async_save": background}
        tree = make_tree(data, training={"train_iters": 6}, checkpoint=checkpoint, parallel={**TP2})
        assert world(2).run(run_training, tree) == [0, 0]
    for iteration in (3, 6):
        assert world(1).run(weights, str(tmp_path / "later"), iteration) == world(1).run(
            weights, str(tmp_path / "now"), iteration
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "background"),
    [*(pytest.param(who, False, marks=pytest.mark.long) for who in ("rank", "launcher")), ("launcher", True)],
)
def test_sigterm_saves_and_the_same_command_continues(
    receiver: str, background: bool, data: str, whole: Path, world: Worlds, tmp_path: Path
) -> None:
    """To one rank alone, all must agree; the launcher passes it on to every process of its ranks' groups."""
    cut = tmp_path / "cut"
    tree = slow_tree(data, cut, **GROUPS)
    tree["checkpoint"].update(save_interval=3, async_save=background)
    run = torchrun(tree, tmp_path, 2)
    wait_for_step(cut, 4, run)
    os.kill(workers(run)[0] if receiver == "rank" else run.pid, signal.SIGTERM)
    output, _ = run.communicate(timeout=200)
    assert "stopped after iteration" in output
    stopped = int((cut / "latest_checkpointed_iteration.txt").read_text())
    assert 4 <= stopped < 20 and max(losses(cut)) == stopped
    assert world(2).run(run_training, slow_tree(data, cut, **GROUPS)) == [0, 0]
    assert losses(cut) == losses(whole)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/megakd-hostile-metadata-ran",)


def record_again(file: Path) -> None:
    """Make the manifest of a checkpoint agree with a file that was changed, as one who means harm would."""
    old = read_manifest(file.parent / "manifest.json")
    files = [hash_file(file) if record.name == file.name else record for record in old.files]
    write_manifest(
        old.path, format=old.format, version=old.version, parameters=old.parameters, parents=old.parents,
        tokenizer=old.tokenizer, files=files,
    )  # fmt: skip


def test_hostile_metadata_runs_nothing(data: str, world: Worlds, tmp_path: Path) -> None:
    tree = make_tree(data, training={"train_iters": 1}, checkpoint={"save": str(tmp_path / "run")})
    assert world(1).run(run_training, tree) == [0]
    metadata = tmp_path / "run" / "iter_0000001" / ".metadata"
    size = metadata.stat().st_size
    metadata.write_bytes(pickle.dumps(Hostile()).ljust(size, b"."))
    record_again(metadata)
    proof = Path("/tmp/megakd-hostile-metadata-ran")
    proof.unlink(missing_ok=True)
    tree["training"]["train_iters"] = 2
    with pytest.raises(Exception, match="cannot be trusted"):
        world(1).run(run_training, tree)
    assert not proof.exists()
