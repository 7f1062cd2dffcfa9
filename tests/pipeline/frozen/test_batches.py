"""What of a range the model sees by itself, and in which microbatches."""

from __future__ import annotations

import numpy as np

from megakd.pipeline.frozen.batches import Stretches, alike_plans, plan_microbatches


def test_microbatches_hold_every_sample_once_and_little_else() -> None:
    rng = np.random.default_rng(0)
    for count, size, tensor_size in ((1, 4, 1), (100, 7, 3), (64, 8, 2), (5, 8, 1)):
        lengths = rng.integers(1, 1026, count)
        plans = plan_microbatches(lengths, micro_batch_size=size, seq_length=1024, tensor_size=tensor_size)
        assert sorted(np.concatenate([plan.places for plan in plans])) == list(range(count))
        assert [len(plan.places) for plan in plans[:-1]] == [size] * (count // size - (count % size == 0))
        for plan in plans:
            longest = lengths[plan.places].max() - 1
            assert longest <= plan.width <= min(1024, longest + 64 * tensor_size)
            assert plan.width == 1024 or plan.width % (64 * tensor_size) % 2 == 0
        batches = list(alike_plans(plans, limit=3))
        assert [plan for batch in batches for plan in batch] == plans
        assert all(len({(len(p.places), p.width) for p in batch}) == 1 and len(batch) <= 3 for batch in batches)
    same = plan_microbatches(np.full(10, 17), micro_batch_size=4, seq_length=16)
    assert [(plan.places.tolist(), plan.width) for plan in same] == [
        ([0, 1, 2, 3], 16), ([4, 5, 6, 7], 16), ([8, 9], 16),
    ]  # fmt: skip


def test_stretches_end_with_documents_and_samples() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (200, 12))
    lengths = rng.integers(2, 13, 200)
    first = np.zeros(rows.shape, dtype=np.bool_)
    first[:, 1:] = rows[:, :-1] == 0
    found = Stretches.of_documents(first, lengths)
    expected = []
    for place, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist())):
        start = 0
        for column in range(length):
            if row[column] == 0 or column == length - 1:
                if column > start:
                    expected.append((place, start, column + 1 - start))
                start = column + 1
    assert list(zip(found.places.tolist(), found.starts.tolist(), found.lengths.tolist())) == expected
