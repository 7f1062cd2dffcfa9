"""The loader: what a step trains on depends on the data, the seed and the step alone."""

import json

import numpy as np
import pytest

from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.loader import Loader, check_vocabulary
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import MismatchError, UsageError

SEQ = 7
EOD = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    for name, num_tokens in (("a", 4000), ("b", 1500), ("bare", 1500)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add_documents(np.random.default_rng(num_tokens).integers(0, 50, num_tokens), np.array([num_tokens]))
            writer.finish()
    (folder / "bare.manifest.json").unlink()
    return folder


def blend_of(folder, names="ab", seed=1, weights=(0.3, 0.7), seq_length=SEQ):
    return Blend([ConcatSamples(IndexedDataset(folder / n), seq_length) for n in names], list(weights), seed)


def loader_of(folder, *, rank=0, dp=1, mbs=2, gbs=8, state=None, **blend):
    return Loader(
        blend_of(folder, **blend),
        seq_length=blend.get("seq_length", SEQ),
        micro_batch_size=mbs,
        global_batch_size=gbs,
        data_parallel_rank=rank,
        data_parallel_size=dp,
        state=state,
    )


def ids_of(microbatch):
    return list(zip(microbatch.dataset_ids_B.tolist(), microbatch.sample_ids_B.tolist()))


def global_batches(folder, dp, count, mbs=2, states=None):
    """The samples of each step in global order, put together from every rank's own microbatches."""
    loaders = [
        loader_of(folder, rank=rank, dp=dp, mbs=mbs, state=None if states is None else states[rank])
        for rank in range(dp)
    ]
    steps = []
    for _ in range(count):
        ranks = [list(next(loader)) for loader in loaders]
        steps.append(
            [pair for microbatches in zip(*ranks) for microbatch in microbatches for pair in ids_of(microbatch)]
        )
    return steps, [loader.state() for loader in loaders]


@pytest.mark.slow
def test_the_first_1000_global_batches_are_the_same_for_any_layout(folder):
    one, states = global_batches(folder, 1, 1000)
    for dp in (2, 4):
        assert global_batches(folder, dp, 1000)[0] == one
        assert global_batches(folder, dp, 100, mbs=1)[0] == one[:100]
    assert len({tuple(step) for step in one}) == 1000
    half, states = global_batches(folder, 4, 500)
    assert half == one[:500]  # asking for more steps changes nothing
    assert all(state == states[0] for state in states)
    states = json.loads(json.dumps(states))  # plain data
    for dp in (1, 2, 4):
        assert global_batches(folder, dp, 500, states=states)[0] == one[500:]


def test_tokens_labels_and_mask_equal_the_twin(folder):
    blend = blend_of(folder)
    loader = Loader(
        blend, seq_length=SEQ, micro_batch_size=4, global_batch_size=8, eod_token=EOD, eod_mask_loss=True, vocab_size=50
    )
    streams = [samples.dataset.tokens.tolist() for samples in blend.datasets]
    for microbatch in next(loader):
        for row in range(4):
            stream = streams[microbatch.dataset_ids_B[row]]
            start = int(microbatch.sample_ids_B[row]) * SEQ
            assert microbatch.tokens_BS[row].tolist() == stream[start : start + SEQ]
            assert microbatch.labels_BS[row].tolist() == stream[start + 1 : start + SEQ + 1]
            assert microbatch.loss_mask_BS[row].tolist() == [token != EOD for token in stream[start : start + SEQ]]
        assert microbatch.tokens_BS.dtype == microbatch.labels_BS.dtype == np.int64
        assert microbatch.tokens_BS.flags.c_contiguous and microbatch.labels_BS.flags.c_contiguous
        assert microbatch.loss_mask_BS.dtype == np.bool_


def test_without_eod_mask_loss_every_position_counts(folder):
    loader = Loader(blend_of(folder), seq_length=SEQ, micro_batch_size=8, global_batch_size=8, eod_token=EOD)
    assert next(loader).microbatch(0).loss_mask_BS.all()


def test_any_rank_reads_any_microbatch(folder):
    steps = [next(loader_of(folder, rank=rank, dp=2)) for rank in range(2)]
    assert len(steps[0]) == steps[0].num_microbatches == 2
    for index in range(2):
        theirs = steps[0].microbatch(index, data_parallel_rank=1)
        assert ids_of(theirs) == ids_of(steps[1].microbatch(index))
        assert np.array_equal(theirs.tokens_BS, steps[1].microbatch(index).tokens_BS)
    for index, rank in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            steps[0].microbatch(index, rank)


def test_positions_and_draws_of_a_step(folder):
    loader = loader_of(folder)
    next(loader)
    step = next(loader)
    assert step.sample_positions.tolist() == list(range(8, 16))
    expected = blend_of(folder).draw(np.arange(8, 16))
    assert np.array_equal(step.draws.sample_id, expected.sample_id)
    assert np.array_equal(step.draws.dataset_index, expected.dataset_index)


def test_another_global_batch_size_continues_at_the_same_position(folder):
    first = loader_of(folder)
    next(first)
    assert next(loader_of(folder, gbs=4, state=first.state())).sample_positions.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed was 1, is now 2"),
        ({"seq_length": 13}, "seq-length was 7, is now 13"),
        ({"weights": (0.5, 0.5)}, "weights of --data-path were 0.3 a .*, are now 0.5 a"),
        ({"names": "ba"}, "data-path was .*, is now"),
        ({"names": "a", "weights": (1,)}, "was .*, is now"),
    ],
)
def test_a_state_of_another_order_is_refused_with_both_values(folder, change, message):
    with pytest.raises(MismatchError, match=message):
        loader_of(folder, state=loader_of(folder).state(), **change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"gbs": 9}, "9 is not a multiple of micro_batch_size 2"),
        ({"gbs": 6, "dp": 2}, "= 4"),
        ({"mbs": 0}, "micro_batch_size 0"),
        ({"rank": 2, "dp": 2}, "rank 2 of 2"),
    ],
)
def test_sizes_that_do_not_divide(folder, sizes, message):
    with pytest.raises(UsageError, match=message):
        loader_of(folder, **sizes)


def test_other_refusals(folder):
    with pytest.raises(UsageError, match="samples of 7, seq_length 8"):
        Loader(blend_of(folder), seq_length=8, micro_batch_size=1, global_batch_size=1)


def test_ids_beyond_the_vocabulary_are_refused_before_the_first_step(folder):
    blend = blend_of(folder)
    check_vocabulary(blend.datasets, 50)
    with pytest.raises(UsageError, match="token id 49, the vocabulary has 49"):
        check_vocabulary(blend.datasets, 49)
    with pytest.raises(UsageError, match="token id 49"):
        Loader(blend, seq_length=SEQ, micro_batch_size=1, global_batch_size=1, vocab_size=49)


@pytest.mark.filterwarnings("ignore:.*no manifest")
def test_without_a_manifest_ids_are_checked_as_they_are_read(folder):
    blend = blend_of(folder, names=["bare"], weights=(1,))
    loader = Loader(blend, seq_length=SEQ, micro_batch_size=50, global_batch_size=50, vocab_size=49)
    with pytest.raises(UsageError, match=r"token id 49 in sample \d+ at token position (\d+)") as error:
        next(loader).microbatch(0)
    position = int(str(error.value).split("position ")[1].split(",")[0])
    assert blend.datasets[0].dataset.tokens[position] == 49
    next(Loader(blend, seq_length=SEQ, micro_batch_size=50, global_batch_size=50, vocab_size=50)).microbatch(0)
