"""A stand-in for mlflow: runs in the JSON file that TRACKED_CALLS names, the calls that megakd makes."""

import json
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

entities = SimpleNamespace(
    Metric=namedtuple("Metric", "key value timestamp step"), Param=namedtuple("Param", "key value")
)


class MlflowClient:
    def __init__(self, tracking_uri=None):
        self._path = Path(os.environ["TRACKED_CALLS"])
        self._state = json.loads(self._path.read_text()) if self._path.exists() else {"experiments": [], "runs": []}
        self._state["uri"] = tracking_uri

    def _save(self):
        self._path.write_text(json.dumps(self._state))

    def get_experiment_by_name(self, name):
        known = self._state["experiments"]
        return SimpleNamespace(experiment_id=known.index(name)) if name in known else None

    def create_experiment(self, name):
        self._state["experiments"].append(name)
        return len(self._state["experiments"]) - 1

    def create_run(self, experiment_id, tags=None, run_name=None):
        run = {"id": len(self._state["runs"]), "experiment": experiment_id, "tags": tags, "name": run_name}
        self._state["runs"].append({**run, "params": {}, "metrics": [], "status": "RUNNING"})
        return SimpleNamespace(info=SimpleNamespace(run_id=run["id"]))

    def search_runs(self, experiment_ids, filter_string):
        found = [run for run in self._state["runs"] if f"'{run['tags']['megakd.run']}'" in filter_string]
        assert filter_string.startswith("tags.`megakd.run` = ")
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=run["id"]), data=SimpleNamespace(params=run["params"]))
            for run in found
        ]

    def _run(self, run_id):
        return self._state["runs"][int(run_id)]

    def update_run(self, run_id, status):
        self._run(run_id)["status"] = status

    def set_tag(self, run_id, key, value):
        self._run(run_id)["tags"][key] = value

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and len(metrics) <= 1000
        self._run(run_id)["metrics"] += [[metric.key, metric.value, metric.step] for metric in metrics]
        self._run(run_id)["params"].update(params)
        self._save()

    def set_terminated(self, run_id, status):
        self._run(run_id)["status"] = status
        self._save()
