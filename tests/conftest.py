"""Fixtures for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worlds import Worlds


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """``world(n)``: n gloo processes that live as long as the session; see worlds.py."""
    worlds = Worlds()
    yield worlds
    worlds.close()
