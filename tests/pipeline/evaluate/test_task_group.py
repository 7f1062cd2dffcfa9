"""The group of nine tasks: its file is in the package, and every task that it names is the harness's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import megakd.pipeline.evaluate

TASK_FILES = Path(megakd.pipeline.evaluate.__file__).parent / "task_files"
FOLDERS = ("hellaswag", "lambada", "winogrande", "openbookqa", "arc", "piqa", "siqa", "storycloze")


@pytest.mark.slow
def test_the_harness_knows_the_group_and_its_tasks() -> None:
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    where = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(TASK_FILES), *(str(where / name) for name in FOLDERS)], include_defaults=False
    )
    group = yaml.safe_load((TASK_FILES / "miniplm.yaml").read_text())
    names = [task["task"] for task in group["task"]]
    assert "miniplm" in manager.all_groups and len(set(names)) == 9
    assert set(names) <= set(manager.all_subtasks)
    assert all(task["num_fewshot"] == 0 for task in group["task"])


@pytest.mark.slow
def test_the_mean_is_unweighted_over_the_metric_that_counts() -> None:
    pytest.importorskip("lm_eval")
    from megakd.pipeline.evaluate.task_figures import TaskFigures, mean_of

    def task(metrics: dict[str, float], primary: str | None, num_documents: int) -> TaskFigures:
        return TaskFigures(metrics, num_documents, 0, "1.0", "", primary)

    norm = task({"acc": 0.9, "acc_norm": 0.5, "acc_norm_stderr": 0.03, "acc_stderr": 0.5}, "acc_norm", 10_000)
    plain = task({"acc": 0.2, "acc_stderr": 0.04}, "acc", 10)
    without = task({"perplexity": 9.0, "perplexity_stderr": 1.0}, None, 10)
    mean = mean_of({"a": norm, "b": plain, "c": without})
    assert mean == {"value": pytest.approx(0.35), "num_tasks": 2.0, "stderr": pytest.approx(0.025)}
    assert mean_of({"a": norm, "c": without}) is None
