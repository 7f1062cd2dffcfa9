"""Tasks of lm-eval, run on the first rank: their figures, and the unweighted mean over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megakd.artefacts.durable_files import FULL
from megakd.errors import UsageError
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.harness import HarnessModel
from megakd.pipeline.evaluate.likelihood import Desk
from megakd.pipeline.evaluate.text import TextCodec

# isort: split
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

TASK_FILES = Path(__file__).parent / "task_files"
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True)
class TaskFigures:
    """Figures of one task. metrics: value of each metric, and ``NAME_stderr``. hash: XXH3-128 of its documents, prompts
    and targets, as they were asked. primary: the metric that counts in the mean; None for tasks without an accuracy."""

    metrics: dict[str, float]
    num_documents: int
    num_fewshot: int
    version: str
    hash: str
    primary: str | None


@dataclass(frozen=True)
class TaskResults:
    """Figures of all tasks. mean: unweighted, over the primary metrics; None for less than two tasks that have one."""

    tasks: dict[str, TaskFigures]
    mean: dict[str, float] | None
    samples: dict[str, list[dict[str, Any]]]
    lm_eval: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the samples as plain data."""
        return {
            "lm_eval": self.lm_eval,
            "tasks": {name: dict(figures.__dict__) for name, figures in self.tasks.items()},
            "mean": self.mean,
        }


def run_tasks(config: EvaluateConfig, desk: Desk, codec: TextCodec) -> TaskResults:
    """Run the tasks through the harness. The first rank calls it, while the others serve.

    Raises UsageError for a task that is not known, whose data set cannot be had, or that generates text.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = _find_tasks(config.task_names, config.include_path)
    limit = config.limit if config.limit is None or config.limit < 1 else int(config.limit)
    try:
        results = simple_evaluate(
            model=HarnessModel(desk, codec),
            tasks=list(config.task_names),
            num_fewshot=config.num_fewshot,
            batch_size=config.micro_batch_size,
            limit=limit,
            bootstrap_iters=config.bootstrap_iters,
            log_samples=True,  # the hashes of the tasks are made of them
            task_manager=manager,
        )
    except _unreachable() as error:
        if getattr(error, "status", None) is not None or getattr(error, "errno", None) in FULL:
            raise
        raise UsageError(
            f"--tasks {','.join(config.task_names)}: a data set cannot be had: {_first_line(error)}. Tasks fetch their "
            "data sets from the Hugging Face hub, or from its cache (HF_HOME): run once where the hub can be reached, "
            "take task files with local data (--include-path), or files of ready requests (--requests)"
        ) from error
    assert results is not None
    return _collect(results)


def mean_of(tasks: Mapping[str, TaskFigures]) -> dict[str, float] | None:
    """Return the unweighted mean of the primary metrics, with its standard error; None for less than two tasks.

    The tasks are independent samples, so the error is ``sqrt(sum stderr^2) / n``.
    """
    chosen = [figures for figures in tasks.values() if figures.primary is not None]
    if len(chosen) < 2:
        return None
    values = [figures.metrics[str(figures.primary)] for figures in chosen]
    errors = [figures.metrics.get(f"{figures.primary}_stderr", math.nan) for figures in chosen]
    mean = {"value": sum(values) / len(values), "num_tasks": float(len(values))}
    if all(map(math.isfinite, errors)):
        mean["stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return mean


def _collect(results: Mapping[str, Any]) -> TaskResults:
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    tasks = {}
    for name, documents in samples.items():
        metrics = _metrics(results["results"][name])
        primary = next((metric for metric in _PREFERRED if metric in metrics), None)
        tasks[name] = TaskFigures(
            metrics=metrics,
            num_documents=int(results["n-samples"][name]["effective"]),
            num_fewshot=int(results["n-shot"].get(name) or 0),
            version=str(results["versions"].get(name)),
            hash=_hash(documents),
            primary=primary,
        )
    return TaskResults(tasks, mean_of(tasks), samples, version("lm_eval"))


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by the metric's name; the name of a filter other than ``none`` follows it after a comma."""
    metrics = {}
    for key, value in entry.items():
        name, _, filter_name = key.partition(",")
        if isinstance(value, int | float) and filter_name and math.isfinite(value):
            metrics[name if filter_name == "none" else key] = float(value)
    return metrics


def _hash(documents: Sequence[Mapping[str, Any]]) -> str:
    hashes = sorted([sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]] for sample in documents)
    return xxhash.xxh3_128_hexdigest(orjson.dumps(hashes))


def _find_tasks(names: Sequence[str], include_path: Sequence[str]) -> Any:
    """Return the harness's manager of the tasks. Raises UsageError for a name that it does not know."""
    if include_path:
        of_user = TaskManager(include_path=list(include_path), include_defaults=False)
        if set(names) <= set(of_user.all_subtasks):
            return of_user  # the harness's own 14,000 task files need not be read, which takes ten seconds
    manager = TaskManager(include_path=[str(TASK_FILES), *include_path])
    for name in names:
        if manager.match_tasks([name]) or Path(name).is_file():
            continue
        near = get_close_matches(name, manager.all_tasks, n=3)
        raise UsageError(
            f"--tasks: lm-eval {version('lm_eval')} has no task, group or tag '{name}'"
            + (f"; near: {', '.join(near)}" if near else "")
            + "; 'lm_eval ls tasks' lists them, --include-path FOLDER adds task files"
        )
    return manager


def _unreachable() -> tuple[type[BaseException], ...]:
    """Errors by which the data set libraries say that a data set cannot be had."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    clients = [import_module(name) for name in ("httpx", "httpx2") if find_spec(name) is not None]
    return (OSError, DatasetsError, HfHubHTTPError, *(client.HTTPError for client in clients))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
