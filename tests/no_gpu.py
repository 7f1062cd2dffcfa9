"""Processes of tests without a CUDA device, on a machine that has one: several ranks of a world would share it.

A process finds its devices once, when it first asks; all ranks are forked from one that has asked already. So the
devices are hidden while that one starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@contextlib.contextmanager
def hidden_gpus() -> Iterator[None]:
    """Hide the CUDA devices from processes that start inside the block."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ.update(HIDDEN)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
