"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pytest import Config
from worlds import Worlds


def pytest_configure(config: Config) -> None:
    """Keep what tests find out about tokenizer engines beside pytest's own cache, and out of the user's."""
    os.environ["MEGAKD_CACHE_DIR"] = str(config.rootpath / ".pytest_cache" / "megakd")


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
