"""Rows of Hugging Face's tensors against those of megatron's, by a slow twin that says where each number goes."""

from __future__ import annotations

import pytest
import torch

from megakd.model.config import ModelConfig, ModelShape
from megakd.model.huggingface.layout import Run, runs, to_ours, to_theirs, within

HEADS, GROUPS, WIDTH, COLUMNS = 6, 2, 4, 5


def _shape() -> ModelShape:
    return ModelConfig(
        num_layers=1, hidden_size=COLUMNS, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH
    ).resolve("a model")


def _qkv() -> dict[str, torch.Tensor]:
    rows = {"query": HEADS * WIDTH, "key": GROUPS * WIDTH, "value": GROUPS * WIDTH}
    numbers = iter(range(10_000))
    return {
        place: torch.tensor([[next(numbers) for _ in range(COLUMNS)] for _ in range(count)], dtype=torch.float64)
        for place, count in rows.items()
    }


def _slow_qkv(theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Megatron's order: for each group its query heads, then its key head, then its value head."""
    rows = []
    for group in range(GROUPS):
        for head in range(HEADS // GROUPS):
            for number in range(WIDTH):
                rows.append(theirs["query"][(group * HEADS // GROUPS + head) * WIDTH + number])
        for place in ("key", "value"):
            for number in range(WIDTH):
                rows.append(theirs[place][group * WIDTH + number])
    return torch.stack(rows)


def test_queries_keys_and_values_lie_group_after_group() -> None:
    theirs, shape = _qkv(), _shape()
    ours = to_ours(theirs, shape)
    assert torch.equal(ours, _slow_qkv(theirs))
    for place, tensor in theirs.items():
        assert torch.equal(to_theirs(ours, place, len(tensor), shape), tensor)


def test_a_bias_goes_where_its_rows_go() -> None:
    theirs, shape = _qkv(), _shape()
    biases = {place: tensor[:, 0].clone() for place, tensor in theirs.items()}
    assert torch.equal(to_ours(biases, shape), _slow_qkv(theirs)[:, 0])


def test_gate_comes_before_up() -> None:
    gate, up = torch.randn(3, COLUMNS), torch.randn(3, COLUMNS)
    ours = to_ours({"up": up, "gate": gate}, _shape())
    assert torch.equal(ours, torch.cat([gate, up]))
    assert torch.equal(to_theirs(ours, "up", 3, _shape()), up)
    assert torch.equal(to_theirs(ours, "gate", 3, _shape()), gate)


def test_padding_of_the_vocabulary_is_left_out() -> None:
    padded = torch.randn(8, COLUMNS)
    assert torch.equal(to_theirs(padded, "vocabulary", 7, _shape()), padded[:7])


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_slices_of_ranks_are_the_whole_and_read_every_row_once(ranks: int) -> None:
    """Cut in 5, a slice begins in the middle of a run."""
    theirs, shape = _qkv(), _shape()
    whole = _slow_qkv(theirs)
    rows = len(whole) // ranks
    seen: dict[str, list[int]] = {place: [] for place in theirs}
    for rank in range(ranks):
        part = torch.full((rows, COLUMNS), float("nan"), dtype=torch.float64)
        filled = 0
        for place, tensor in theirs.items():
            for run in within(runs(place, len(tensor), shape), rank * rows, (rank + 1) * rows):
                part[run.ours : run.ours + run.rows] = tensor[run.theirs : run.theirs + run.rows]
                seen[place].extend(range(run.theirs, run.theirs + run.rows))
                filled += run.rows
        assert filled == rows
        assert torch.equal(part, whole[rank * rows : (rank + 1) * rows])
    assert all(sorted(seen[place]) == list(range(len(tensor))) for place, tensor in theirs.items())


def test_a_run_is_cut_to_a_slice() -> None:
    assert within([Run(0, 10, 4), Run(4, 20, 4)], 12, 21) == [Run(2, 0, 2), Run(4, 8, 1)]
    assert within([Run(0, 10, 4)], 14, 20) == []
