"""Parts of a dataset by ranges of documents: no token of one part is ever in a sample of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import make_config, make_tree, write_dataset

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.writer import IndexedWriter
from megakd.data.loader import Loader
from megakd.data.samples.packing import open_samples
from megakd.data.samples.protocol import Samples
from megakd.data.samples.selected import SelectedSamples, ids_in_dataset, selection_of, unselected
from megakd.data.samples.split import PartSamples, Split
from megakd.data.selection import Selection, SelectionWriter
from megakd.errors import MismatchError, UsageError
from megakd.train.preflight import check_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """Documents of 1 to 30 tokens, each token the number of its document."""
    folder = tmp_path_factory.mktemp("split")
    lengths = np.random.default_rng(0).integers(1, 31, 251).astype(np.int32)
    writer = IndexedWriter(folder / "data", np.uint16)
    writer.add_documents(np.repeat(np.arange(251), lengths), lengths)
    writer.finish(parameters={}, parents={}, tokenizer=None)
    return IndexedDataset(str(folder / "data"))


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("949,50,1", (0.949, 0.05, 0.001)),
        ("'99,1,0'", (0.99, 0.01, 0.0)),  # quotes that a shell array keeps
        ("969, 30, 1", (0.969, 0.03, 0.001)),
        ("8/1/1", (0.8, 0.1, 0.1)),
        ("1", (1.0, 0.0, 0.0)),
        (".9,.1", (0.9, 0.1, 0.0)),
    ],
)
def test_shares(text: str, shares: tuple[float, float, float]) -> None:
    assert Split(text).shares == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "0,0,0", "0,1,0", "-1,2", "1;2", "nan,1", "1,,2", "1e9,2"])
def test_texts_that_are_no_split(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        _ = Split(text).shares


def test_documents_are_cut_as_megatron_cuts_them() -> None:
    """Rounded ends of the cumulative shares: parts follow one another and take every document."""
    for text in ("949,50,1", "99990,8,2", "1,1,1", "3,2", "1"):
        for number in (0, 1, 2, 3, 7, 251, 10_007):
            parts = [Split(text).documents(number, part) for part in range(3)]
            assert parts[0][0] == 0 and parts[2][1] == number
            assert parts[0][1] == parts[1][0] and parts[1][1] == parts[2][0]
            assert parts[0][1] == round(Split(text).shares[0] * number)


@pytest.mark.parametrize("packing", ["concat", "document"])
@pytest.mark.parametrize("selected", [False, True])
def test_parts_share_no_document(packing: Any, selected: bool, dataset: IndexedDataset, tmp_path: Path) -> None:
    every = samples = open_samples(packing, dataset, 31, lambda: pytest.fail("no tokenizer is needed"))
    if selected:
        samples = SelectedSamples(samples, select(every, np.arange(0, every.num_samples, 3), tmp_path))
    split, seen = Split("7,2,1"), 0
    for part in range(3):
        first, end = split.documents(dataset.num_documents, part)
        cut = PartSamples(samples, first, end)
        seen += cut.num_samples
        ids = np.arange(cut.num_samples)
        for row, length in zip(cut.read(ids), cut.lengths(ids)):
            assert first <= row[:length].min() and row[:length].max() < end
        assert unselected(cut) is every and (selection_of(cut) is not None) == selected
        assert (every.starts(ids_in_dataset(cut, ids)) == cut.starts(ids)).all()
        with pytest.raises(IndexError):
            cut.read(np.array([cut.num_samples]))
    assert samples.num_samples - 2 <= seen <= samples.num_samples  # at most one across each seam


def select(samples: Samples, ids: Any, folder: Path) -> Selection:
    with SelectionWriter(folder / "selection") as writer:
        writer.append(ids)
        writer.finish(
            packing=samples.packing, seq_length=samples.seq_length, num_samples=samples.num_samples,
            dataset=samples.dataset.fingerprint, rule={},
        )  # fmt: skip
    return Selection(folder / "selection")


def test_a_run_with_a_split(tmp_path: Path) -> None:
    one, two = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "two", num_tokens=3000, seed=1)
    tree = make_tree(one, data={"data_path": ["0.3", one, "0.7", two], "split": "80,15,5"})
    plan = check_run(make_config(tree), 1)
    assert plan.valid_blend is not None and plan.blend.weights == plan.valid_blend.weights
    assert [samples.dataset.num_documents for samples in plan.blend.datasets] == [120, 60]
    ends = [int((s.starts(np.array([s.num_samples - 1])) + s.lengths(np.array([s.num_samples - 1])))[0])
            for s in plan.blend.datasets]  # fmt: skip
    starts = [int(s.starts(np.array([0]))[0]) for s in plan.valid_blend.datasets]
    assert ends[0] <= 96 * 50 <= starts[0] and ends[1] <= 48 * 50 <= starts[1]
    small = make_config(make_tree(one, data={"split": "9999,1,0"}))
    assert check_run(small, 1).valid_blend is None  # told when the run starts
    for data, message in (
        ({"split": "1,9999"}, "the training part of .*, documents 0 to 0 of 120, has no sample"),
        ({"split": "8,2", "valid_data_path": [two]}, "both say what is held out"),
    ):
        with pytest.raises(UsageError, match=message):
            check_run(make_config(make_tree(one, data=data)), 1)
    with pytest.raises(UsageError, match="leaves no sample to evaluate on"):
        check_run(make_config(make_tree(one, data={"split": "9999,1,0"}, evaluate={"skip_train": True})), 1)


def test_an_order_is_not_continued_with_another_split(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")

    def loader(split: str, state: Any = None) -> Loader:
        blend = check_run(make_config(make_tree(data, data={"split": split})), 1).blend
        return Loader(blend, seq_length=16, micro_batch_size=2, global_batch_size=8, state=state)

    state = loader("8,2").state()
    loader("8,2", state)
    with pytest.raises(MismatchError, match="was .*documents 0 to 96.*documents 0 to 84"):
        loader("7,3", state)
