"""Marks for parameters: of many cases alike, a few are enough before a commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def fast_one_in(number: int, cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters, all but the first of every ``number`` marked slow."""
    return [pytest.param(case, marks=pytest.mark.slow) if i % number else case for i, case in enumerate(cases)]


def slow(*values: Any) -> Any:
    """One set of parameters, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
