"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pytest import Config
from worlds import Worlds


def pytest_configure(config: Config) -> None:
    """Keep what tests find out about tokenizer engines, and local data sets, beside pytest's own cache, and out of the
    user's; ask no hub for anything.

    Workers that share the machine share its cores too: threads that wait for one another's turn cost a multiple.
    """
    os.environ["MEGAKD_CACHE_DIR"] = str(config.rootpath / ".pytest_cache" / "megakd")
    os.environ["HF_HOME"] = str(config.rootpath / ".pytest_cache" / "huggingface")
    os.environ["HF_HUB_OFFLINE"] = "1"
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
        os.environ["LOCAL_WORLD_SIZE"] = str(workers)


@pytest.fixture(autouse=True)
def import_path_of_children() -> Iterator[None]:
    """What a verb that is run in this process keeps off its children's import path is no matter of the next test's."""
    before = os.environ.get("PYTHONSAFEPATH")
    yield
    if before is None:
        os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """``world(n)``: n gloo processes that live as long as the session; see worlds.py."""
    worlds = Worlds()
    yield worlds
    worlds.close()
