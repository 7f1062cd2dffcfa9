"""Runs of a verb over ranges that end early."""

from __future__ import annotations

from typing import Any


def make_some(work: Any, maker: Any, count: int) -> None:
    """Make and commit the first ``count`` ranges of ``work``, as a run that was killed leaves them."""
    for _ in range(count):
        claim = work.claim()
        assert claim is not None
        result = maker.make(*work.bounds(claim.index), ids=work.ids_of(claim.index))
        work.commit(claim, result, provenance=maker.provenance)
