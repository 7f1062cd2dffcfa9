"""One queue of kernels a device, where tensor parallelism counts on it, unless the user has said otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.layout import ParallelConfig
from megakd.parallel import order_kernels

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("layout", "before", "after", "words"),
    [
        ({}, None, None, None),
        ({"context_parallel_size": 2}, "8", "8", None),
        (TP, None, "1", f"{NAME} is set to 1 for --tensor-model-parallel-size: "),
        (SP, None, "1", f"{NAME} is set to 1 for --sequence-parallel: "),
        (SP, "1", "1", None),
        (SP, "8", "8", f"Warning: {NAME} is 8: --sequence-parallel is faster with 1"),
    ],
)
def test_it(layout: dict[str, Any], before: str | None, after: str | None, words: str | None) -> None:
    environment = {} if before is None else {NAME: before}
    notice = order_kernels(ParallelConfig(**layout), environment)
    assert environment.get(NAME) == after
    assert notice is None if words is None else notice is not None and notice.startswith(words)
