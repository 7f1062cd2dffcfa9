"""Sentence packing is MiniPLM's rule, told again here by decoding text, and samples of it train on every label once."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_config, make_tree, one_step
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece

from megakd import _csrc
from megakd.__main__ import run
from megakd.artefacts.manifest import verify_files
from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.loader import Loader
from megakd.data.samples.documents import DocumentSamples
from megakd.data.samples.packing import open_samples
from megakd.data.samples.sentences import SentenceSamples, manifest_path, open_sentences, token_classes, write_sentences
from megakd.data.tokenizer import Tokenizer, build_tokenizer
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.pipeline.datasets import pack
from megakd.train.preflight import check_run

KINDS = ["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer", "NullTokenizer"]
ODDITIES = (
    "A (b. c) [d! e] f. g.h i? j;k\tl. \u00abm.\u00bb n ... o!? {p;} q.) r(. s \u4e2d\u6587\u3002 t",
    "no end of any sentence here at all just words and words and words",
    "",
    "x",
    " . . .5 3.14 a.b.c U.S. e.g. f",
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "SentencePieceTokenizer": build_tokenizer(
            "SentencePieceTokenizer", train_sentencepiece(folder / "sp.model", vocab_size=600)
        ),
        "HuggingFaceTokenizer": build_tokenizer("HuggingFaceTokenizer", train_byte_bpe(folder / "bpe")),
        "ByteTokenizer": build_tokenizer("ByteTokenizer", None),
        "NullTokenizer": build_tokenizer("NullTokenizer", None, vocab_size=50),
    }


def ends_sentence(tokenizer, token, following):
    """The rule of the paper's code, by decoding."""
    text = tokenizer.decode([token])
    if token == tokenizer.eod or "\n" in text:
        return True
    marked = any(mark in text for mark in ".!?;")
    open_bracket = any(text.count(a) > text.count(b) for a, b in ("()", "[]", "{}"))
    return marked and not open_bracket and " " in tokenizer.decode([token, following])


def slow_starts(tokenizer, stream, window):
    """Starts and the last end, one window at a time."""
    bounds, start = [0], 0
    while len(stream) - start > window:
        cut = start + window
        for i in range(start + window - 1, start, -1):
            if ends_sentence(tokenizer, stream[i], stream[i + 1]):
                cut = i + 1
                break
        bounds.append(cut)
        start = cut
    if len(stream) - start > 1:
        bounds.append(len(stream))
    return bounds


def write(prefix, documents, tokenizer, *, dtype=np.uint16):
    lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(np.array([i for ids in documents for i in ids], dtype=np.int64), lengths)
        writer.finish(tokenizer=tokenizer.describe())
    return IndexedDataset(prefix)


def documents_of(tokenizer, count=40):
    if tokenizer.type == "NullTokenizer":
        return [[*np.random.default_rng(i).integers(0, 50, 30).tolist(), 50] for i in range(count)]
    lines = text_lines()
    texts = [*ODDITIES, *("\n".join(lines[7 * i : 7 * i + 7]) for i in range(count))]
    texts += [" ".join(lines[7 * i : 7 * i + 7]) for i in range(count)]  # without line breaks
    return [[*tokenizer.encode(text), tokenizer.eod] for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_length", [1, 6, 31, 252])
def test_packing_equals_the_slow_twin(tmp_path, tokenizers, kind, seq_length):
    tokenizer = tokenizers[kind]
    dataset = write(tmp_path / "d", documents_of(tokenizer), tokenizer)
    manifest = write_sentences(dataset, seq_length, tokenizer)
    samples = SentenceSamples(dataset, seq_length)
    ids = np.arange(samples.num_samples)
    bounds = slow_starts(tokenizer, dataset.tokens.tolist(), seq_length + 1)
    assert [*samples.starts(ids).tolist(), int(samples.ends(ids[-1:])[0])] == bounds
    assert manifest.parameters["num_samples"] == samples.num_samples == len(bounds) - 1
    assert not verify_files(manifest.path)
    lengths = samples.lengths(ids)
    assert lengths.min() >= 2 and lengths.max() <= seq_length + 1
    shuffled = np.random.default_rng(0).permutation(np.repeat(ids, 2))
    rows, stream = samples.read(shuffled), dataset.tokens.tolist()
    assert rows.dtype == np.int64 and rows.shape == (len(shuffled), seq_length + 1)
    for row, i in zip(rows.tolist(), shuffled.tolist()):
        own = stream[bounds[i] : bounds[i + 1]]
        assert row == own + [0] * (seq_length + 1 - len(own))
    samples.prefetch(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_say_what_decoding_says(tokenizers, kind):
    """Every pair of an end of a sentence, or a few others, with every next token."""
    tokenizer = tokenizers[kind]
    classes = token_classes(tokenizer)
    interesting = np.flatnonzero(classes & 3).tolist()[:60] + list(range(0, tokenizer.vocab_size, 97))
    for token in interesting:
        for following in range(tokenizer.vocab_size):
            fast = bool(classes[token] & 1 or (classes[token] & 2 and classes[following] & 4))
            assert fast == ends_sentence(tokenizer, token, following), (token, following)
    if kind != "NullTokenizer":
        assert (classes & 2).any() and (classes & 4).any()


class Pieces(Tokenizer):
    """Each id is one of the given texts; the last one is no text but the end of a document."""

    type = "NullTokenizer"
    path = None

    def __init__(self, *pieces):
        self._pieces = (*pieces, "")
        self.vocab_size, self.eod = len(self._pieces), len(pieces)
        super().__init__("".join(pieces).encode())

    def encode(self, text):
        raise NotImplementedError

    def token_bytes(self):
        raise NotImplementedError

    def decode(self, ids):
        return "".join(self._pieces[i] for i in ids)


def test_the_classes_of_some_tokens():
    always, if_space, space = 1, 2, 4
    known = {
        "a": 0, " a": space, "a ": space, ".": if_space, "a!": if_space, "?\"": if_space, ";)": if_space,
        " .": always | space, ". ": always | space, "\n": always, ".\n": always, " \n": always | space, "(\n": always,
        "(.": 0, ".(": 0, "[?": 0, "{;": 0, ")(.": if_space, "(.)": if_space, ").": if_space, " (.": space,
        "].": if_space, ".5": if_space, "\u3002": 0, ":": 0, ",": 0, "\t.": if_space,
    }  # fmt: skip
    tokenizer = Pieces(*known)
    classes = token_classes(tokenizer)
    assert classes.tolist() == [*known.values(), always]
    for token in range(tokenizer.vocab_size):
        for following in range(tokenizer.vocab_size):
            fast = bool(classes[token] & 1 or (classes[token] & 2 and classes[following] & 4))
            assert fast == ends_sentence(tokenizer, token, following)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.integers(2, 9), st.integers(2, 5), st.sampled_from(["u1", "i8"]))
def test_cuts_of_any_stream_with_any_buffer(stream, window, capacity, dtype):
    """Eight ids, one of each class."""
    tokens, classes = np.array(stream, dtype=dtype), np.arange(8, dtype=np.uint8)
    found, buffer = [0], np.zeros(capacity, dtype=np.int64)
    while found[-1] < len(stream):
        buffer[0] = found[-1]
        found += buffer[1 : _csrc.sentence_cuts(tokens, classes, window, buffer)].tolist()
    expected, start = [0], 0
    while start < len(stream):
        rest = stream[start:]
        if len(rest) <= window:
            start = len(stream)
        else:
            ends = [i for i in range(1, window) if rest[i] & 1 or (rest[i] & 2 and rest[i + 1] & 4)]
            start += ends[-1] + 1 if ends else window
        expected.append(start)
    assert found == expected


def test_the_kernel_refuses_what_does_not_fit():
    classes, bounds = np.zeros(4, np.uint8), np.zeros(9, np.int64)
    with pytest.raises(IndexError, match="token position 5: an id beyond the table of 4"):
        _csrc.sentence_cuts(np.array([0, 0, 0, 0, 0, 4, 0, 0], np.int32), classes, 6, bounds)
    with pytest.raises(IndexError, match="position 3"):
        _csrc.sentence_cuts(np.array([0, 0, 0, -1], np.int32), classes, 3, bounds)
    for wrong in (
        (np.zeros(9), classes, 6, bounds),
        (np.zeros(9, np.int32), classes.astype(np.int32), 6, bounds),
        (np.zeros(9, np.int32), classes, 1, bounds),
        (np.zeros(9, np.int32), classes, 6, bounds[:0]),
        (np.zeros(9, np.int32), classes, 6, bounds - 1),
        (np.zeros((3, 3), np.int32), classes, 6, bounds),
        (np.zeros(18, np.int32)[::2], classes, 6, bounds),
    ):
        with pytest.raises(ValueError, match="sentence_cuts: "):
            _csrc.sentence_cuts(*wrong)


def test_padding_counts_as_no_label(tmp_path, tokenizers):
    """Over an epoch every token that does not start a sample is a label once, and nothing else is."""
    tokenizer = tokenizers["HuggingFaceTokenizer"]
    dataset = write(tmp_path / "d", documents_of(tokenizer), tokenizer)
    samples = open_samples("sentence", dataset, 31, lambda: tokenizer)
    for eod_mask_loss in (False, True):
        seen = np.zeros(dataset.num_tokens, dtype=np.int64)
        loader = Loader(
            Blend([samples], None, 3),
            seq_length=31,
            micro_batch_size=4,
            global_batch_size=4 * samples.num_samples,
            eod_token=tokenizer.eod,
            eod_mask_loss=eod_mask_loss,
            vocab_size=tokenizer.vocab_size,
        )
        for microbatch in next(loader):  # four epochs
            starts = samples.starts(microbatch.sample_ids_B)
            positions = (starts[:, None] + 1 + np.arange(31))[microbatch.loss_mask_BS]
            assert np.array_equal(dataset.tokens[positions], microbatch.labels_BS[microbatch.loss_mask_BS])
            assert np.array_equal(dataset.tokens[positions - 1], microbatch.tokens_BS[microbatch.loss_mask_BS])
            np.add.at(seen, positions, 1)
        expected = np.full(dataset.num_tokens, 4)
        expected[samples.starts(np.arange(samples.num_samples))] = 0
        expected[int(samples.ends(np.array([samples.num_samples - 1]))[0]) :] = 0
        if eod_mask_loss:
            expected[1:][dataset.tokens[:-1] == tokenizer.eod] = 0
        assert np.array_equal(seen, expected)
    assert loader.state()["packing"] == ["sentence"]


def test_it_is_written_once_and_anew_for_another_dataset(tmp_path, tokenizers):
    tokenizer = tokenizers["ByteTokenizer"]
    opened = []

    def opener():
        opened.append(1)
        return tokenizer

    dataset = write(tmp_path / "d.v1", [b"A b. C d. E f. G h."], tokenizer)
    first = open_sentences(dataset, 7, opener)
    again = open_sentences(dataset, 7, opener)
    assert opened == [1] and first.manifest.fingerprint == again.manifest.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir() if "sentence" in path.name) == [
        "d.v1.sentence-7.i64",
        "d.v1.sentence-7.json",
    ]
    other = write(tmp_path / "d.v1", [b"A b c d e. C d. E f. G h. I j."], tokenizer)
    with pytest.raises(MismatchError, match=f"{dataset.fingerprint}, this is dataset {other.fingerprint}"):
        SentenceSamples(other, 7)
    assert open_sentences(other, 7, opener).num_samples != first.num_samples and len(opened) == 2
    assert first.read(np.array([0]))[0].tobytes() == np.frombuffer(b"A b.\0\0\0\0", np.uint8).astype(np.int64).tobytes()


@pytest.mark.slow
def test_many_processes_at_once_write_it_once(tmp_path, tokenizers):
    tokenizer = tokenizers["ByteTokenizer"]
    write(tmp_path / "d", [list(b"A sentence, so called. ") * 4000], tokenizer)
    code = (
        "import time, megakd.data.samples.sentences as s\n"
        "import megakd.data.indexed.dataset as i, megakd.data.tokenizer as t\n"
        f"d = i.IndexedDataset({str(tmp_path / 'd')!r})\n"
        "slow = lambda: time.sleep(1) or t.ByteTokenizer()\n"
        "print(s.open_sentences(d, 31, slow).manifest.fingerprint)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    done = [process.communicate(timeout=200) for process in running]
    assert len({out for out, _ in done}) == 1 and all(process.returncode == 0 for process in running), done
    assert sum("writing" in err for _, err in done) == 1


def test_what_cannot_be_packed(tmp_path, tokenizers):
    tokenizer = tokenizers["ByteTokenizer"]
    dataset = write(tmp_path / "d", [b"A b. C d. E f. G h."], tokenizer)
    with pytest.raises(UsageError, match="megakd pack .*--seq-length 7"):
        SentenceSamples(dataset, 7)
    with pytest.raises(MismatchError, match=f"{tokenizer.hash}, this one is"):
        write_sentences(dataset, 7, tokenizers["NullTokenizer"])
    for seq_length in (0, 1 << 31, 10**20):
        with pytest.raises(UsageError, match=f"seq_length {seq_length}"):
            write_sentences(dataset, seq_length, tokenizer)
    with pytest.raises(MismatchError, match="this one is"):
        open_sentences(dataset, 7, lambda: tokenizers["NullTokenizer"])
    assert not list(tmp_path.glob("*.lock"))
    with pytest.raises(UsageError, match="1 tokens do not make a sample"):
        write_sentences(write(tmp_path / "one", [b"A"], tokenizer), 7, tokenizer)
    samples = open_sentences(dataset, 7, lambda: tokenizer)
    for bad in (-1, samples.num_samples):
        with pytest.raises(IndexError, match=f"sample {bad} of"):
            samples.read(np.array([0, bad]))
    (tmp_path / "d.sentence-7.i64").write_bytes(b"\0" * 8)
    with pytest.raises(CorruptError, match="sentence-7.i64: 8 bytes"):
        open_sentences(dataset, 7, lambda: tokenizer)


def test_the_last_token_alone_is_no_sample(tmp_path, tokenizers):
    tokenizer = tokenizers["ByteTokenizer"]
    for text, expected in ((b"abcdefghX", [0, 8]), (b"abcdefghXY", [0, 8, 10]), (b"abcdefgh", [0, 8])):
        dataset = write(tmp_path / "d", [text], tokenizer)
        samples = open_sentences(dataset, 7, lambda: tokenizer)
        ids = np.arange(samples.num_samples)
        assert [*samples.starts(ids).tolist(), int(samples.ends(ids[-1:])[0])] == expected


def test_the_verb(tmp_path, tokenizers, capsys):
    tokenizer = tokenizers["SentencePieceTokenizer"]
    dataset = write(tmp_path / "d", documents_of(tokenizer), tokenizer)
    assert run(pack.main, [str(tmp_path / "d"), "--seq-length", "31"]) == ExitStatus.COMPLETE
    samples = SentenceSamples(dataset, 31)
    assert f"{samples.num_samples} samples" in capsys.readouterr().out
    assert samples.manifest.path == manifest_path(dataset, 31)
    other = ["--tokenizer-type", "ByteTokenizer"]
    assert run(pack.main, [str(tmp_path / "d"), *other]) == ExitStatus.MISMATCH
    (tmp_path / "d.manifest.json").unlink()
    assert run(pack.main, [str(tmp_path / "d")]) == ExitStatus.USAGE
    assert "--tokenizer-type" in capsys.readouterr().err


def test_documents_as_samples(tmp_path, tokenizers):
    tokenizer = tokenizers["ByteTokenizer"]
    texts = [b"abc", b"", b"defgh", b"i"]
    dataset = write(tmp_path / "d", texts, tokenizer)
    samples = open_samples("document", dataset, 4, lambda: tokenizer)
    ids = np.arange(4)
    assert isinstance(samples, DocumentSamples) and samples.num_samples == 4
    assert samples.starts(ids).tolist() == [0, 3, 3, 8] and samples.lengths(ids).tolist() == [3, 0, 5, 1]
    assert samples.read(ids[::-1]).tolist() == [[*text, *[0] * (5 - len(text))] for text in texts[::-1]]
    loader = Loader(Blend([samples], None, 0), seq_length=4, micro_batch_size=4, global_batch_size=4)
    batch = next(loader).microbatch(0)
    assert sorted(batch.loss_mask_BS.sum(1).tolist()) == [0, 0, 2, 4]
    with pytest.raises(UsageError, match="document 2 has 5 tokens, a sample of seq_length 3 at most 4"):
        DocumentSamples(dataset, 3)
    with pytest.raises(IndexError, match="sample 4 of 4"):
        samples.read(np.array([4]))


def test_a_run_trains_on_sentences(tmp_path, tokenizers, world):
    """The packing is made by the run itself, and the loss is a mean over labels that are no padding."""
    tokenizer = tokenizers["ByteTokenizer"]
    dataset = write(tmp_path / "d", documents_of(tokenizer, 3), tokenizer)
    changes = {"packing": "sentence", "seq_length": 32}
    tree = make_tree(str(tmp_path / "d"), data=changes, training={"global_batch_size": 16})
    stepped = world(1).run(one_step, tree)[0]
    samples = SentenceSamples(dataset, 32)
    batch = next(Loader(Blend([samples], None, 5), seq_length=32, micro_batch_size=2, global_batch_size=16))
    assert stepped["tokens"] == sum(int(microbatch.loss_mask_BS.sum()) for microbatch in batch) < 16 * 32
    with pytest.raises(UsageError, match="document 0 has"):
        check_run(make_config({**tree, "data": {**tree["data"], "packing": "document"}}), 1)


def test_held_out_data_may_be_packed_otherwise(tmp_path, tokenizers):
    write(tmp_path / "d", documents_of(tokenizers["ByteTokenizer"], 3), tokenizers["ByteTokenizer"])
    for valid_packing, expected in ((None, "sentence"), ("concat", "concat")):
        data = {"packing": "sentence", "valid_data_path": [str(tmp_path / "d")], "valid_packing": valid_packing}
        plan = check_run(make_config(make_tree(str(tmp_path / "d"), data=data)), 1)
        assert plan.blend.datasets[0].packing == "sentence" and plan.valid_blend.datasets[0].packing == expected
