"""The selection on disk, and training on selected samples as if they were a dataset of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import make_config, make_tree, write_dataset

from megakd.artefacts.manifest import verify_files
from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import Loader
from megakd.data.samples.concat import ConcatSamples
from megakd.data.samples.documents import DocumentSamples
from megakd.data.samples.selected import SelectedSamples, ids_in_dataset, unselected
from megakd.data.selection import Selection, SelectionWriter
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.train.preflight import check_run

SEQ = 16


@pytest.fixture
def samples(tmp_path: Path) -> ConcatSamples:
    return ConcatSamples(IndexedDataset(write_dataset(tmp_path / "data")), SEQ)


def write_selection(folder: Path, samples: Any, ids: Any, **other: Any) -> Selection:
    told = {
        "packing": samples.packing, "seq_length": samples.seq_length, "num_samples": samples.num_samples,
        "dataset": samples.dataset.fingerprint,
    }  # fmt: skip
    with SelectionWriter(folder) as writer:
        for piece in np.array_split(np.asarray(ids, np.int64), 3):
            writer.append(piece)
        writer.finish(rule={"why": "test"}, **{**told, **other})
    return Selection(folder)


def test_a_selection_round_trips(tmp_path: Path, samples: ConcatSamples) -> None:
    ids = [0, 1, 5, 77, 300]
    selection = write_selection(tmp_path / "s", samples, ids, parents={"scores teacher": "ab"})
    assert selection.ids.tolist() == ids and len(selection) == 5 and selection.ids.dtype == np.int64
    assert (selection.packing, selection.seq_length, selection.num_samples) == ("concat", SEQ, samples.num_samples)
    assert selection.manifest.parameters["num_kept"] == 5 and selection.manifest.parents["scores teacher"] == "ab"
    assert (tmp_path / "s" / "ids.i64").read_bytes() == np.array(ids, "<i8").tobytes()
    assert verify_files(tmp_path / "s" / "selection.json") == []
    with pytest.raises(MismatchError, match=f"from dataset {samples.dataset.fingerprint}, expected dataset 00"):
        Selection(tmp_path / "s", expect_dataset="00")
    again = write_selection(tmp_path / "s", samples, [*ids, 301])
    assert again.fingerprint != selection.fingerprint and selection.ids.tolist() == ids  # the old file, still mapped


def test_samples_are_known_by_their_ids_in_the_dataset(tmp_path: Path, samples: ConcatSamples) -> None:
    """What is on disk for a sample is found by them, whether it is read through a selection or not."""
    selected = SelectedSamples(samples, write_selection(tmp_path / "s", samples, [3, 5, 77]))
    assert unselected(selected) is samples and unselected(samples) is samples
    ids = np.array([2, 0])
    assert ids_in_dataset(selected, ids).tolist() == [77, 3] and ids_in_dataset(samples, ids).tolist() == [2, 0]


@pytest.mark.parametrize("ids", [[1, 1], [2, 1], [0, 1, 2, 3, 3, 4]])
def test_ids_must_ascend(tmp_path: Path, samples: ConcatSamples, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        write_selection(tmp_path / "s", samples, ids)
    assert not list((tmp_path / "s").iterdir())


def test_ids_beyond_the_dataset_are_refused(tmp_path: Path, samples: ConcatSamples) -> None:
    with pytest.raises(ValueError, match=f"id {samples.num_samples} of {samples.num_samples}"):
        write_selection(tmp_path / "s", samples, [samples.num_samples])
    write_selection(tmp_path / "s", samples, [3, 4])
    raw = bytearray((tmp_path / "s" / "ids.i64").read_bytes())
    raw[8:16] = np.array([samples.num_samples], "<i8").tobytes()
    (tmp_path / "s" / "ids.i64").write_bytes(raw)
    with pytest.raises(CorruptError, match=f"to {samples.num_samples} of"):
        Selection(tmp_path / "s")


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_selected_samples_are_those_of_the_source(tmp_path: Path, samples: ConcatSamples, packing: str) -> None:
    source: Any = samples if packing == "concat" else DocumentSamples(samples.dataset, 64)
    ids = np.sort(np.random.default_rng(0).choice(source.num_samples, 40, replace=False))
    selected = SelectedSamples(source, write_selection(tmp_path / "s", source, ids))
    assert selected.num_samples == 40 and selected.seq_length == source.seq_length
    some = np.array([7, 0, 39, 7])
    selected.prefetch(some)
    for method in ("read", "starts", "lengths"):
        assert np.array_equal(getattr(selected, method)(some), getattr(source, method)(ids[some]))
    for outside in (40, -1):
        with pytest.raises(IndexError):
            selected.read(np.array([outside]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dataset": "00"}, "from dataset 00, but .*data has dataset"),
        ({"packing": "sentence"}, "from packing sentence, but .* has packing concat"),
        ({"seq_length": 8}, "from seq_length 8"),
        ({"num_samples": 999}, "from number of samples 999"),
    ],
)
def test_a_selection_of_something_else_is_refused(
    tmp_path: Path, samples: ConcatSamples, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        SelectedSamples(samples, write_selection(tmp_path / "s", samples, [1, 2], **other))


def test_a_selection_of_nothing_is_refused(tmp_path: Path, samples: ConcatSamples) -> None:
    with pytest.raises(UsageError, match="keeps no sample"):
        SelectedSamples(samples, write_selection(tmp_path / "s", samples, []))


def loader_of(samples: Any, state: Any = None) -> Loader:
    blend = Blend([samples], None, 3)
    return Loader(blend, seq_length=SEQ, micro_batch_size=2, global_batch_size=4, state=state)


def test_an_epoch_over_the_selection_is_each_kept_sample_once(tmp_path: Path, samples: ConcatSamples) -> None:
    ids = np.arange(5, 325, 8)
    loader = loader_of(SelectedSamples(samples, write_selection(tmp_path / "s", samples, ids)))
    seen = [m.tokens_BS for _ in range(len(ids) // 4) for m in next(loader)]
    rows = sorted(map(tuple, np.concatenate(seen).tolist()))
    assert rows == sorted(map(tuple, samples.read(ids)[:, :-1].tolist()))


def test_a_resume_with_another_selection_is_refused(tmp_path: Path, samples: ConcatSamples) -> None:
    one, other = (write_selection(tmp_path / n, samples, ids) for n, ids in (("a", range(40)), ("b", range(1, 41))))
    state = loader_of(SelectedSamples(samples, one)).state()
    loader_of(SelectedSamples(samples, one), state)
    for wrong in (SelectedSamples(samples, other), samples):
        with pytest.raises(MismatchError, match=f"selection {one.fingerprint}"):
            loader_of(wrong, state)
    with pytest.raises(MismatchError, match=f"is now .*selection {one.fingerprint}"):
        loader_of(SelectedSamples(samples, one), loader_of(samples).state())


def test_a_run_uses_its_selections(tmp_path: Path, samples: ConcatSamples) -> None:
    data = str(samples.dataset.prefix)
    other = write_dataset(tmp_path / "other", seed=1)
    selection = write_selection(tmp_path / "s", samples, range(3, 60))

    def plan(paths: list[str], *selections: str) -> Any:
        tree = make_tree(data, data={"data_path": paths, "seq_length": SEQ, "selection": list(selections)})
        return check_run(make_config(tree), 1)

    blend = plan([data, other], str(selection.folder), "all").blend
    assert [s.num_samples for s in blend.datasets] == [57, ConcatSamples(IndexedDataset(other), SEQ).num_samples]
    parents = plan([data], str(selection.folder)).parents
    assert parents == {"data0": samples.dataset.fingerprint, "selection0": selection.fingerprint}
    with pytest.raises(UsageError, match="--selection has 1 entries, --data-path 2 datasets"):
        plan([data, other], str(selection.folder))
    with pytest.raises(MismatchError, match="selected from dataset"):
        plan([other], str(selection.folder))
    # Its documents are longer than a sample: that they are is no news to who gave the wrong packing.
    tree = make_tree(data, data={"seq_length": SEQ, "packing": "document", "selection": [str(selection.folder)]})
    with pytest.raises(MismatchError, match="selected from packing concat, but .* has packing document"):
        check_run(make_config(tree), 1)
