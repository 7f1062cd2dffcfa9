"""Runs of ``megakd evaluate`` inside a world of the tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from megakd.config.tree import from_dict, validate
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.preflight import check_evaluate


def run_evaluate(tree: dict[str, Any]) -> str:
    """A whole run in a world; what it prints."""
    from megakd.pipeline.evaluate.run import evaluate

    config = from_dict(EvaluateConfig, tree)
    validate(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert evaluate(config, check_evaluate(config, int(os.environ["WORLD_SIZE"]))) == 0
    return printed.getvalue()


def results_in(folder: Path) -> dict[str, Any]:
    """The only results in a folder."""
    (path,) = folder.glob("*.json")
    results: dict[str, Any] = json.loads(path.read_text())
    return results
