"""Figures beside a run's own record: the same names everywhere, one run however often it goes on, no server needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import make_config, make_tree

from megakd.config.tree import to_dict
from megakd.errors import UsageError
from megakd.train.evaluate import Evaluation, HeldOut
from megakd.train.optim import Update
from megakd.train.record import writers
from megakd.train.record.metrics import Cost, Metrics
from megakd.train.record.writers import Opening, build_writers, check_writers
from megakd.train.step import StepLoss

STAND_INS = Path(__file__).resolve().parent / "trackers"
LOSS = StepLoss(
    loss=4.5, lm=5.0, kd=4.0, agreement=0.5, teacher_entropy=2.0, num_tokens=128, num_kd_tokens=128, alpha=0.5
)
EVALUATION = Evaluation(
    lm_loss=5.5, kd_loss=None, total_loss=5.5, alpha=None, lm_weight=None, agreement=None, teacher_entropy=None,
    z_loss=None, bits_per_byte=None, calibration_error=0.1, num_tokens=128, held_out=HeldOut("f", 8, 128, None, None),
)  # fmt: skip


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The stand-ins are imported for the packages; reads what they were called with."""
    path = tmp_path / "calls"
    monkeypatch.setenv("TRACKED_CALLS", str(path))
    monkeypatch.syspath_prepend(str(STAND_INS))

    def read() -> Any:
        text = path.read_text() if path.exists() else ""
        return json.loads(text) if text.startswith("{") else [json.loads(line) for line in text.splitlines()]

    return read


def log(tree: dict[str, Any], *, start_step: int = 0, complete: bool = True) -> None:
    """One step and one evaluation through the run's record."""
    config = make_config(tree)
    metrics = Metrics(
        config.training,
        config.logging,
        Cost(6.0, 2.0),
        seq_length=config.data.seq_length,
        folder=Path(config.checkpoint.save) if config.checkpoint.save else None,
        settings=to_dict(config),
        rank=0,
        world_size=1,
        start_step=start_step,
    )
    metrics.log(start_step + 1, LOSS, Update(grad_norm=1.0, lr=0.1), samples=8)
    metrics.log_evaluation(start_step + 1, EVALUATION)
    metrics.close(complete=complete)


def tree_of(tmp_path: Path, **logging: str) -> dict[str, Any]:
    return make_tree("text", logging=logging, checkpoint={"save": str(tmp_path / "run")})


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.slow
def test_wandb(tmp_path: Path, calls: Callable[[], Any]) -> None:
    log(tree_of(tmp_path, wandb_project="p", wandb_exp_name="e", wandb_entity="t"), complete=False)
    first = calls()
    assert [name for name, _ in first] == ["init", "define_metric", "define_metric", "log", "log", "finish"]
    begin = first[0][1]
    assert (begin["project"], begin["name"], begin["entity"], begin["resume"]) == ("p", "e", "t", None)
    assert begin["dir"] == str(tmp_path / "run") and begin["config"]["student.num_layers"] == 4
    assert first[2][1] == {"metric": "*", "step_metric": "iteration"} and first[-1][1] == {"exit_code": 1}
    step, valid = first[3][1], first[4][1]
    assert step["lm loss"] == 5.0 and step["total loss"] == 4.5 and valid["lm loss validation"] == 5.5
    names = {name for name in tags(tmp_path / "run" / "tensorboard") if not name.endswith("vs samples")}
    assert (step.keys() | valid.keys()) - {"iteration", "samples"} == names

    log(tree_of(tmp_path, wandb_project="p"), start_step=1)  # it goes on: the same run
    again = calls()[len(first) :]
    assert again[0][1]["id"] == begin["id"] and again[0][1]["resume"] == "allow" and again[0][1]["name"] == "run"
    assert again[3][1]["iteration"] == 2 and again[-1][1] == {"exit_code": 0}
    log(tree_of(tmp_path, wandb_project="p"))  # a new run in the folder
    assert calls()[-6][1]["id"] != begin["id"]


@pytest.mark.slow
def test_mlflow(tmp_path: Path, calls: Callable[[], Any]) -> None:
    log(tree_of(tmp_path, mlflow_tracking_uri="u", mlflow_experiment="x", mlflow_run_name="r"), complete=False)
    state = calls()
    (run,) = state["runs"]
    assert state["uri"] == "u" and state["experiments"] == ["x"] and (run["name"], run["status"]) == ("r", "KILLED")
    assert run["params"]["student.num_layers"] == "4" and ["lm loss validation", 5.5, 1] in run["metrics"]
    tree = tree_of(tmp_path, mlflow_tracking_uri="u", mlflow_experiment="x", mlflow_run_name="r")
    tree["training"]["train_iters"] = 9
    log(tree, start_step=1)
    (run,) = calls()["runs"]
    assert run["status"] == "FINISHED" and ["lm loss", 5.0, 2] in run["metrics"]
    assert run["tags"]["changed training.train_iters"] == "9" and run["params"]["training.train_iters"] == "4"


@pytest.mark.parametrize("fault", ["offline", "never", "log"])
def test_a_server_that_fails_costs_its_record_alone(
    fault: str, tmp_path: Path, calls: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("TRACKED_FAULT", fault)
    log(tree_of(tmp_path, wandb_project="p"))
    said = capfd.readouterr().err
    names = [name for name, _ in calls()]
    assert "Traceback" not in said and (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    if fault == "offline":
        assert f"recorded in {tmp_path / 'run' / 'wandb'} for 'wandb sync'" in said
        assert calls()[0][1]["mode"] == "offline" and names[-1] == "finish"
    elif fault == "never":
        assert "wandb could not begin, nothing is recorded there: ConnectionError: no server" in said and not names
    else:
        assert said.count("did not take figures") == 1 and "ConnectionError: the server is gone" in said
        assert names[-1] == "finish"


def test_a_server_that_stalls_is_left(
    tmp_path: Path, calls: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED_FAULT", "stall")
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.5)
    said: list[str] = []
    config = make_config(make_tree("text", logging={"wandb_project": "p", "wandb_save_dir": str(tmp_path)}))
    (writer,) = build_writers(Opening(config.logging, None, to_dict(config), 0, False, said.append))
    for step in range(2000):  # more than a pipe holds
        writer.add({"lm loss": 1.0, "a figure with a long name, of which there are many": 2.0}, step=step)
    writer.close(complete=True)
    assert any("wandb did not take everything" in line for line in said)


def test_what_is_not_installed_or_not_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    check_writers(make_config(make_tree("text")).logging)
    for flag, name in (("wandb_project", "wandb"), ("mlflow_tracking_uri", "mlflow"), ("mlflow_experiment", "mlflow")):
        config = make_config(make_tree("text", logging={flag: "x"}))
        with pytest.raises(UsageError, match=rf"--{flag.replace('_', '-')}: .*pip install 'megakd\[{name}\]'"):
            check_writers(config.logging)
    for flag in ("wandb_exp_name", "wandb_save_dir", "wandb_entity", "mlflow_run_name"):
        with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} without"):
            make_config(make_tree("text", logging={flag: "x"}))


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'megakd[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log(tree_of(tmp_path, wandb_project="p"))
    log(tree_of(tmp_path, wandb_project="p"), start_step=1)
    identity = json.loads((tmp_path / "run" / writers.RUN_ID).read_text())["id"]
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))) == 2


def test_the_real_mlflow_in_a_database(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'megakd[mlflow]'")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    for start_step in (0, 1):
        log(tree_of(tmp_path, mlflow_tracking_uri=uri, mlflow_experiment="x"), start_step=start_step)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "lm loss")] == [1, 2]
    assert run.data.params["student.num_layers"] == "4"
