"""Tokenizers under Megatron's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece

from megakd.data.tokenizer import (
    ByteTokenizer,
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


def test_token_bytes_of_a_byte_level_file_without_a_decoder(models: Path, tmp_path: Path) -> None:
    content = json.loads((models / "bpe/tokenizer.json").read_text()) | {"decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    without = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    assert np.array_equal(without.token_bytes(), build_tokenizer("HuggingFaceTokenizer", models / "bpe").token_bytes())


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
