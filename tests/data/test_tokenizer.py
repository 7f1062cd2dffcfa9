"""Tokenizers under Megatron's names, and the gate in front of the fast engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece

from megakd.data import engines
from megakd.data.engines import Choice, Engine, choose_engine, hostile_texts
from megakd.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    UnencodableError,
    build_tokenizer,
    same_tokenizer,
)
from megakd.errors import UsageError

SAMPLES = ["", "Hello world", "  two\n\nlines\t", "naïve 中文 👩‍👩‍👧 \u0301", "</s><|endoftext|>", "\x00\r\n"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_sentencepiece(folder / "sp.model")
    train_byte_bpe(folder / "bpe")
    return folder


@pytest.fixture(params=["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"])
def tokenizer(request: pytest.FixtureRequest, models: Path) -> Tokenizer:
    model = {"SentencePieceTokenizer": models / "sp.model", "HuggingFaceTokenizer": models / "bpe"}
    return build_tokenizer(request.param, model.get(request.param))


def test_batches_are_the_single_encodings_one_after_the_other(tokenizer: Tokenizer) -> None:
    ragged = tokenizer.encode_batch(SAMPLES)
    want = [tokenizer.encode(text) for text in SAMPLES]
    assert ragged.lengths.tolist() == [len(ids) for ids in want]
    assert ragged.tokens.tolist() == [i for ids in want for i in ids]
    assert tokenizer.encode_batch([]).lengths.tolist() == []


def test_decode_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in ("Hello world", "  two\n\nlines\t", "naïve 中文 👩‍👩‍👧"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_bytes_add_up_to_the_utf8_length(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
    assert tokenizer.eod is not None and sizes[tokenizer.eod] == 0
    leading_space = 1 if isinstance(tokenizer, SentencePieceTokenizer) else 0  # the model was trained to add one
    for text in ("Hello world", "  two\n\nlines\t", "naïve 中文 👩‍👩‍👧", *text_lines()[:50]):
        if text:
            assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) + leading_space


def test_ids_are_the_engines_own(models: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer as HuggingFace

    processor = sentencepiece.SentencePieceProcessor(model_file=str(models / "sp.model"))
    ours = build_tokenizer("SentencePieceTokenizer", models / "sp.model")
    assert (ours.vocab_size, ours.eod) == (processor.get_piece_size(), processor.eos_id())
    engine = HuggingFace.from_file(str(models / "bpe/tokenizer.json"))
    theirs = build_tokenizer("HuggingFaceTokenizer", models / "bpe/tokenizer.json")
    assert (theirs.vocab_size, theirs.eod) == (engine.get_vocab_size(), engine.token_to_id("<|endoftext|>"))
    for text in SAMPLES:
        assert ours.encode(text) == processor.encode(text)
        assert theirs.encode(text) == engine.encode(text, add_special_tokens=False).ids


def test_truncation_and_padding_of_the_model_file_are_ignored(models: Path, tmp_path: Path) -> None:
    content = json.loads((models / "bpe/tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    whole = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path).encode("x " * 50) == whole.encode("x " * 50)


def test_an_ambiguous_end_of_document_is_nobodys_guess(models: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((models / "bpe/tokenizer.json").read_bytes())
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path).eod is None  # <|endoftext|> or <|im_end|>?
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path).eod == 1
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(UsageError, match="<nowhere>"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


def test_null_tokenizer_reads_ids() -> None:
    tokenizer = build_tokenizer("NullTokenizer", None, vocab_size=100)
    assert isinstance(tokenizer, NullTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.encode("1 2  99\n100") == [1, 2, 99, 100]
    assert tokenizer.decode([5, 6, 100]) == "5 6"
    for text in ("1 -2", "1.5", "abc", "101", "²", "9" * 5000):
        with pytest.raises(UnencodableError):
            tokenizer.encode(text)


def test_the_model_of_another_type_is_told_with_the_flag_to_change(models: Path, tmp_path: Path) -> None:
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces/tokenizer.model").write_bytes((models / "sp.model").read_bytes())
    (tmp_path / "text").write_text("neither")
    for kind, path, other in (
        ("HuggingFaceTokenizer", models / "sp.model", "SentencePieceTokenizer"),
        ("HuggingFaceTokenizer", tmp_path / "pieces", "SentencePieceTokenizer"),
        ("SentencePieceTokenizer", models / "bpe/tokenizer.json", "HuggingFaceTokenizer"),
        ("SentencePieceTokenizer", models / "bpe", "HuggingFaceTokenizer"),
    ):
        with pytest.raises(UsageError, match=f"^--tokenizer-model {path}.*: --tokenizer-type {other}$"):
            build_tokenizer(kind, path)
        with pytest.raises(UsageError, match=f"^--m {path}.* it is a {other}'s$"):  # nobody gave the type by a flag
            build_tokenizer(kind, path, model_flag="--m", type_flag=None)
    for kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        with pytest.raises(UsageError, match=f"^--tokenizer-model {tmp_path}/text: not a ") as caught:
            build_tokenizer(kind, tmp_path / "text")
        assert "--tokenizer-type" not in str(caught.value)


def test_identity_is_type_and_model(models: Path, tmp_path: Path) -> None:
    one = build_tokenizer("SentencePieceTokenizer", models / "sp.model")
    (tmp_path / "copy.model").write_bytes((models / "sp.model").read_bytes())
    copy = build_tokenizer("SentencePieceTokenizer", tmp_path / "copy.model")
    assert same_tokenizer(one.describe(), copy) and same_tokenizer(one, json.loads(json.dumps(copy.describe())))
    assert not same_tokenizer(one, ByteTokenizer())
    assert not same_tokenizer(NullTokenizer(10), NullTokenizer(11))
    other = train_sentencepiece(tmp_path / "other.model", vocab_size=590)
    assert not same_tokenizer(one, build_tokenizer("SentencePieceTokenizer", other))


@pytest.mark.parametrize(
    ("kind", "model", "vocab_size"),
    [
        ("NoTokenizer", None, None),
        ("NullTokenizer", None, None),
        ("NullTokenizer", None, 0),
        ("SentencePieceTokenizer", None, None),
        ("SentencePieceTokenizer", "org/name-on-a-hub", None),
        ("SentencePieceTokenizer", "garbage", None),
        ("SentencePieceTokenizer", ".", None),
        ("HuggingFaceTokenizer", ".", None),
        ("HuggingFaceTokenizer", "garbage", None),
        ("ByteTokenizer", None, 300),
    ],
)
def test_what_cannot_work_is_refused(
    kind: Any, model: str | None, vocab_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage").write_bytes(b"no model \xff")
    with pytest.raises(UsageError):
        build_tokenizer(kind, model, vocab_size=vocab_size)


class _Fake:
    """A fast engine that is the reference engine but for a planted difference."""

    def __init__(self, kind: Any, model: Path, differs: Callable[[str], bool]) -> None:
        self._tokenizer, self._differs = build_tokenizer(kind, model), differs

    def encode(self, text: str) -> Sequence[int]:
        ids = self._tokenizer.encode(text)
        return [7] * (len(ids) + 1) if self._differs(text) else ids


def engine_for(tokenizer: Tokenizer, choice: Choice, *, max_resident_bytes: int = 0) -> Engine:
    kind: Any = tokenizer.type
    return Engine(kind, tokenizer.path, choice, lambda: tokenizer, max_resident_bytes=max_resident_bytes)


def plant(monkeypatch: pytest.MonkeyPatch, differs: Callable[[str], bool]) -> None:
    monkeypatch.setattr(engines, "_load_gigatoken", lambda kind, model: _Fake(kind, model, differs))


def test_the_gate_falls_back_on_one_different_id(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    plant(monkeypatch, lambda text: text == "only in the corpus")
    assert choose_engine(tokenizer, ["fine"]).engine == "gigatoken"
    choice = choose_engine(tokenizer, ["fine", "only in the corpus"])
    assert choice.engine == "reference" and "only in the corpus" in choice.reason
    assert engine_for(tokenizer, choice).encode_batch(["only in the corpus"]).tokens.tolist() != [7] * 9
    with pytest.raises(UsageError, match="only in the corpus"):
        choose_engine(tokenizer, ["only in the corpus"], mode="gigatoken")
    assert choose_engine(tokenizer, [], mode="reference").engine == "reference"


def test_the_gate_falls_back_on_any_hostile_string(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    clean = [text for text in hostile_texts(()) if not any(literal in text for literal in tokenizer.literals)]
    for chosen in random.Random(0).sample(clean, 10):
        plant(monkeypatch, lambda text, chosen=chosen: text == chosen)  # type: ignore[misc]
        assert choose_engine(tokenizer, []).engine == "reference"


def test_documents_with_a_control_token_written_out_go_to_the_reference(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", models / "sp.model")
    plant(monkeypatch, lambda text: "</s>" in text)
    choice = choose_engine(tokenizer, [])
    assert choice.engine == "gigatoken" and "</s>" in choice.routed
    assert Choice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice
    texts = ["plain", "with </s> inside", "", "</s>"]
    ragged, want = engine_for(tokenizer, choice).encode_batch(texts), tokenizer.encode_batch(texts)
    assert ragged.tokens.tolist() == want.tokens.tolist() and ragged.lengths.tolist() == want.lengths.tolist()
    # A guise of the token that a search does not find is a reason to fall back.
    plant(monkeypatch, lambda text: "</s>" in text or "＜／ｓ＞" in text)
    assert choose_engine(tokenizer, []).engine == "reference"


def test_a_model_that_the_fast_engine_cannot_load_falls_back(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: str, model: Path) -> None:
        raise ValueError("unigram is not supported")

    monkeypatch.setattr(engines, "_load_gigatoken", refuse)
    choice = choose_engine(build_tokenizer("HuggingFaceTokenizer", models / "bpe"), [])
    assert choice.engine == "reference" and "unigram is not supported" in choice.reason


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_the_real_fast_engine_gives_the_reference_ids(normalization: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    model = train_sentencepiece(tmp_path / "sp.model", normalization=normalization)
    corpus = ["\n".join(text_lines()[i : i + 30]) for i in range(0, 3000, 30)]
    for tokenizer in (SentencePieceTokenizer(model), HuggingFaceTokenizer(models / "bpe/tokenizer.json")):
        choice = choose_engine(tokenizer, corpus)
        # An engine that reloads all the time must give the same ids, too.
        for limit in (0, 1):
            engine = engine_for(tokenizer, choice, max_resident_bytes=limit)
            texts = [*corpus, *hostile_texts(tokenizer.literals), "</s> in <|endoftext|> text"]
            ragged, want = engine.encode_batch(texts), tokenizer.encode_batch(texts)
            assert ragged.tokens.tolist() == want.tokens.tolist()
            assert ragged.lengths.tolist() == want.lengths.tolist()


def test_a_very_long_text_has_the_reference_ids(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(engines, "_LARGE_BYTES", 1000)
    tokenizer = HuggingFaceTokenizer(models / "bpe/tokenizer.json")
    long = "word and wörd " * 100
    for limit in (1, 1 << 30):
        engine = Engine(
            "HuggingFaceTokenizer",
            tokenizer.path,
            Choice("gigatoken", "test"),
            lambda: tokenizer,
            max_resident_bytes=limit,
            turns=tmp_path / "turns.lock",
        )
        assert engine.encode_batch([long, "short"]).lengths[1] == len(tokenizer.encode("short"))
        assert np.array_equal(engine.encode_arrays([long])[0], tokenizer.encode_arrays([long])[0])
    assert (tmp_path / "turns.lock").exists()
