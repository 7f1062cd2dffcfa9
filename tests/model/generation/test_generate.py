"""Continuations equal a forward pass over the whole text for each token, whoever is in the batch, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow
from model.generation.generated import PROMPTS, WAYS, continue_prompts, continue_ways, twin
from worlds import RankError, Worlds


@pytest.fixture(scope="module")
def whole(world: Worlds) -> dict[str, Any]:
    """Continuations in one process, by name of the way of choosing tokens."""
    (ways,) = world(1).run(continue_ways, (1, 1), 100)
    return ways  # type: ignore[no-any-return]


@pytest.mark.slow
def test_greedy_tokens_equal_a_forward_pass_for_each(whole: dict[str, Any], world: Worlds) -> None:
    (expected,) = world(1).run(twin, PROMPTS)
    assert [ids for ids, _, _ in whole["greedy"]] == [ids for ids, _ in expected]
    for (_, log_probs, finish), (ids, total) in zip(whole["greedy"], expected):
        assert len(log_probs) == len(ids) == 12 and finish == "length"
        assert sum(log_probs) == pytest.approx(total, rel=1e-5)
    assert len({tuple(ids) for ids, _, _ in whole["greedy"]}) == len(PROMPTS) - 1  # two prompts are equal


@pytest.mark.slow
def test_others_in_the_batch_do_not_matter(whole: dict[str, Any], world: Worlds) -> None:
    (alone,) = world(1).run(continue_ways, (1, 1), 1)
    (pairs,) = world(1).run(continue_ways, (1, 1), 2, True)
    for way in WAYS:
        tokens = [ids for ids, _, _ in whole[way]]
        assert [ids for ids, _, _ in alone[way]] == tokens
        assert [ids for ids, _, _ in pairs[way]] == tokens
    drawn = whole["drawn"]
    assert drawn[0][0] != drawn[-1][0], "a prompt that comes again gets another text"
    assert drawn != whole["greedy"]


@pytest.mark.parametrize("layout", [slow((2, 1)), slow((1, 2)), pytest.param((2, 2), marks=pytest.mark.long)])
def test_layouts_do_not_matter(layout: tuple[int, int], whole: dict[str, Any], world: Worlds) -> None:
    for rank in world(layout[0] * layout[1]).run(continue_ways, layout, 4):
        for way in WAYS:
            assert [ids for ids, _, _ in rank[way]] == [ids for ids, _, _ in whole[way]]
            for (_, there, _), (_, here, _) in zip(rank[way], whole[way]):
                assert there == pytest.approx(here, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_stop_ends_a_text(whole: dict[str, Any], world: Worlds) -> None:
    stop = whole["greedy"][1][0][5]
    (stopped,) = world(1).run(continue_with_stops, PROMPTS, stop)
    for (ids, _, _), (short, log_probs, finish), (upto, _, _) in zip(whole["greedy"], *stopped):
        kept = ids[: ids.index(stop)] if stop in ids else ids
        assert (short, finish) == (kept, "stop" if stop in ids else "length") and len(log_probs) == len(short)
        assert upto == (ids[: ids.index(stop) + 1] if stop in ids else ids)  # a text that a function ends keeps its end


def continue_with_stops(prompts: list[list[int]], stop: int) -> list[Any]:
    by_id = continue_prompts(prompts, stop_ids=(stop,))
    return [by_id, continue_prompts(prompts, stops=lambda ids: ids[-1] == stop)]


@pytest.mark.slow
def test_a_layout_that_cannot_read_one_token_is_refused(world: Worlds) -> None:
    with pytest.raises(RankError, match="read one by one"):
        world(2).run(continue_prompts, PROMPTS, (2, 1), 4, None, 3, (), 5, True)
