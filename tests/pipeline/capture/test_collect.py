"""From a journal to a store: of each sample the last step, the same bytes after a stop, nothing foreign or damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from logits.rows import as_dicts, random_rows
from runs import TOKENIZER, VOCAB, write_dataset

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.codec import Rows
from megakd.logits.journal import Journal, JournalWriter, check_journal, commit_steps, cut_back, training_spec
from megakd.logits.spec import StoreSpec
from megakd.logits.store import LogitsStore, verify_store
from megakd.pipeline.capture.collect import Collection, open_collection
from megakd.pipeline.capture.collect_main import main as collect
from megakd.pipeline.datasets.verify import main as verify

SEQ, SAMPLES = 16, 62
# (sample, step) by rank: of two commits; sample 5 is met three times, 9 twice in one step, by two ranks
MET = {
    (1, 4): {0: [(5, 1), (40, 1), (9, 3), (0, 4)], 1: [(7, 2), (9, 3), (5, 3)]},
    (5, 6): {0: [(40, 6)], 1: [(61, 5), (5, 6)]},
}
LAST = {5: 6, 40: 6, 9: 3, 0: 4, 7: 2, 61: 5}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "data", num_tokens=1000)


def spec_of(data: str) -> StoreSpec:
    dataset = IndexedDataset(data).fingerprint
    return StoreSpec(
        kind="top_p_k",
        value_bits=32,
        top_k=8,
        vocab_size=VOCAB,
        packing="concat",
        seq_length=SEQ,
        num_samples=SAMPLES,
        shard_samples=100,
        parents={"dataset": dataset, "model": ""},
        tokenizer=TOKENIZER,
    )


def folder_of(data: str) -> Path:
    return Path(data).with_name("journal") / IndexedDataset(data).fingerprint


def rows_of(sample: int, step: int) -> Rows:
    return random_rows(100 * sample + step, SEQ, VOCAB, 8)


def tokens_of(data: str, sample: int) -> np.ndarray:
    return ConcatSamples(IndexedDataset(data), SEQ).read(np.array([sample]))[0, :-1]


def write_journal(data: str, spec: StoreSpec | None = None) -> Path:
    """Of two ranks, in segments of two records."""
    folder = folder_of(data)
    spec = training_spec(spec or spec_of(data), folder, folder.parents[1])
    for steps, ranks in MET.items():
        segments = []
        for rank, met in ranks.items():
            writer = JournalWriter(folder, spec, writer=f"r{rank:05d}", num_records=2)
            for sample, step in met:
                writer.add(sample, step, tokens_of(data, sample), rows_of(sample, step))
            segments += writer.flush()
        commit_steps(folder, spec, segments, steps=steps)
    return folder


def opened(data: str, output: Path) -> Collection:
    return open_collection(folder_of(data).parent, data, output, value_bits="32", shard_samples=7)


def run(data: str, output: Path, *flags: str) -> int:
    argv = ["--journal", str(folder_of(data).parent), "--data-path", data, "--output", str(output)]
    return collect([*argv, "--value-bits", "32", "--shard-samples", "7", *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_rows_of_each_sample(data: str, tmp_path: Path) -> None:
    folder = write_journal(data)
    assert len(list((folder / "segments").glob("*.json"))) == 6
    assert run(data, tmp_path / "store") == 0
    store = LogitsStore(tmp_path / "store", dataset=IndexedDataset(data).fingerprint)
    steps = np.fromfile(tmp_path / "store" / "steps.i32", "<i4")
    for sample in range(SAMPLES):
        found = store.read(sample, tokens_of(data, sample))
        assert steps[sample] == LAST.get(sample, -1)
        if sample not in LAST:
            assert found is None
        else:
            assert found is not None and as_dicts(found) == as_dicts(rows_of(sample, LAST[sample]))
    assert store.spec.details == {"online": True, "first_step": 2, "last_step": 6}
    assert verify_store(tmp_path / "store") == [] and not list((tmp_path / "store").rglob("*.lock"))
    assert run(data, tmp_path / "store") == 0  # finished already


def test_a_stopped_run_goes_on(data: str, tmp_path: Path) -> None:
    write_journal(data)
    assert run(data, tmp_path / "whole") == 0
    part = opened(data, tmp_path / "part")
    for _ in range(3):
        claim = part.work.claim()
        assert claim is not None
        part.work.commit(claim, part.make(claim.index), provenance={})
    abandoned = part.work.claim()  # by a process that dies
    assert abandoned is not None
    abandoned.release()
    assert run(data, tmp_path / "part") == 0
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_another_journal_does_not_go_on_with_a_store(data: str, tmp_path: Path) -> None:
    folder = write_journal(data)
    part = opened(data, tmp_path / "s")
    claim = part.work.claim()
    assert claim is not None
    part.work.commit(claim, part.make(claim.index), provenance={})
    cut_back(folder, 4)
    with pytest.raises(MismatchError, match="model"):
        run(data, tmp_path / "s")


def test_what_was_not_committed_does_not_count(data: str) -> None:
    folder = write_journal(data)
    cut_back(folder, 5)  # a checkpoint that no commit belongs to: all of its steps come again
    assert [path.name for path in folder.glob("*.json")] == ["00000001-00000004.json"]
    assert len(list((folder / "segments").glob("*.json"))) == 4
    steps, _ = Journal(folder).latest()
    assert {sample: step for sample, step in enumerate(steps.tolist()) if step >= 0} == {5: 3, 40: 1, 9: 3, 0: 4, 7: 2}


def test_foreign_data_is_refused(data: str, tmp_path: Path) -> None:
    write_journal(data)
    other = write_dataset(tmp_path / "other", num_tokens=1000, seed=1)
    with pytest.raises(MismatchError, match="give what was trained on"):
        open_collection(folder_of(data).parent, other, tmp_path / "s")
    folder_of(data).rename(folder_of(other))
    collection = open_collection(folder_of(data).parent, other, tmp_path / "s", shard_samples=SAMPLES)
    with pytest.raises(MismatchError, match="sample 0 of .*other input ids"):
        collection.make(0)
    with pytest.raises(UsageError, match="--logits-save-dir"):
        open_collection(tmp_path / "nowhere", data, tmp_path / "s")
    with pytest.raises(UsageError, match=f"give {folder_of(data).parent}"):
        open_collection(folder_of(other), data, tmp_path / "s")
    for output in (folder_of(other), folder_of(other).parent):
        with pytest.raises(UsageError, match="a journal of logits lies there"):
            open_collection(folder_of(data).parent, other, output)
    with pytest.raises(UsageError, match="a file is there"):
        open_collection(folder_of(data).parent, other, Path(f"{data}.bin") / "s")
    with pytest.raises(UsageError, match="--from-step"):
        open_collection(folder_of(data).parent, other, tmp_path / "s", from_step=7)


def test_rows_of_two_kinds_are_refused(data: str, tmp_path: Path) -> None:
    folder = write_journal(data)
    fewer = training_spec(replace(spec_of(data), top_k=7), folder, folder.parents[1])
    with pytest.raises(MismatchError, match="top_k 8 there, 7 here"):
        check_journal(folder, fewer)
    commit_steps(folder, fewer, [], steps=(7, 8))
    with pytest.raises(MismatchError, match="top_k 7 there, 8 here"):
        run(data, tmp_path / "s")


def test_steps_that_are_there_twice_are_refused(data: str) -> None:
    folder = write_journal(data)
    commit_steps(folder, training_spec(spec_of(data), folder, folder.parents[1]), [], steps=(6, 8))
    with pytest.raises(CorruptError, match="has too"):
        Journal(folder)


@pytest.mark.parametrize("suffix", ["rows", "index", "json", "records"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_found(how: str, suffix: str, data: str, tmp_path: Path) -> None:
    folder = write_journal(data)
    path = folder / "segments" / f"00000001-r00000-0000.{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if how == "flip" else bytes(content[:-1]))
    with pytest.raises(CorruptError):
        journal = Journal(folder)
        journal.latest()
        for place, sample in enumerate((5, 40)):  # those of the first segment
            journal.read(place, tokens_of(data, sample))


@pytest.mark.parametrize("suffix", ["rows", "index", "json", "records"])
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_damage_is_told_and_can_be_left_out(how: str, suffix: str, data: str, tmp_path: Path) -> None:
    folder = write_journal(data)
    assert verify([str(folder.parent)]) == 0 and verify([str(folder)]) == 0
    path = folder / "segments" / f"00000005-r00001-0000.{suffix}"  # of samples 61 and 5
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content))
    assert verify([str(folder.parent)]) == 5
    with pytest.raises(CorruptError):
        run(data, tmp_path / "strict")
    assert run(data, tmp_path / "store", "--skip-damaged") == 0
    steps = np.fromfile(tmp_path / "store" / "steps.i32", "<i4")
    left = {sample: step for sample, step in (LAST | {5: 3}).items() if sample != 61}
    assert {sample: step for sample, step in enumerate(steps.tolist()) if step >= 0} == left
    found = LogitsStore(tmp_path / "store").read(5, tokens_of(data, 5))
    assert found is not None and as_dicts(found) == as_dicts(rows_of(5, 3))


def test_a_shard_that_another_process_left_damaged_is_made_anew(data: str, tmp_path: Path) -> None:
    write_journal(data)
    assert run(data, tmp_path / "whole") == 0
    part = opened(data, tmp_path / "part")
    while (claim := part.work.claim()) is not None:
        part.work.commit(claim, part.make(claim.index), provenance={})
    index = tmp_path / "part" / "shards" / "00000001.index"
    content = bytearray(index.read_bytes())
    content[30] ^= 1
    index.write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=r"1 of 9 shards .* run again"):
        run(data, tmp_path / "part")
    assert run(data, tmp_path / "part") == 0
    assert files(tmp_path / "part") == files(tmp_path / "whole")
