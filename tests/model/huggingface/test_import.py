"""Models of every family from Hugging Face folders: logits equal those of transformers, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.folders import CASES, Case, logits_of_transformers, random_tokens, write_folder
from model.huggingface.frozen_logits import frozen_logits, joined
from numpy.typing import NDArray

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
EXPERTS_TP_2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, NDArray[np.float32]]]:
    """Folder and logits of each case."""
    made, tokens = {}, random_tokens()
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, logits_of_transformers(write_folder(folder, case), tokens)
    return made


def has_experts(case: Case) -> bool:
    return case.model_type in ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(
    world: Any, folders: dict[str, tuple[Path, NDArray[np.float32]]], layout: str
) -> None:
    sizes = LAYOUTS[layout]
    plain = [name for name in CASES if not (layout == "TP 2" and has_experts(CASES[name]))]
    expert = [name for name in CASES if name not in plain]
    for names, layout_sizes in ((plain, sizes), (expert, EXPERTS_TP_2)):
        if not names:
            continue
        tokens = random_tokens()[:, : 28 if layout_sizes.get("sequence_parallel") else None]
        size = max(
            layout_sizes.get("tensor_model_parallel_size", 1), layout_sizes.get("pipeline_model_parallel_size", 1)
        )
        paths = [str(folders[name][0]) for name in names]
        ours = joined(world(size).run(frozen_logits, paths, layout_sizes, tokens))
        for name, logits in zip(names, ours):
            theirs = folders[name][1][:, : tokens.shape[1]]
            assert logits.shape == theirs.shape
            difference = np.abs(logits - theirs).max() / np.abs(theirs).max()
            assert difference < 1e-5, f"{name}: {difference}"
