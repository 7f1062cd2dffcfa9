"""End-of-document tokens, with their reasons, and models of formats that are named instead of read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizer_models import train_byte_bpe, train_sentencepiece

from megakd.data.tokenizer import build_tokenizer, same_tokenizer
from megakd.data.tokenizers.end_of_document import EndOfDocument, find_end_of_document
from megakd.errors import UsageError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_sentencepiece(folder / "sp.model")
    train_byte_bpe(folder / "bpe")  # has <|endoftext|> as id 0, <|im_end|> as id 1
    return folder


def folder_with(models: Path, folder: Path, **files: object) -> Path:
    (folder / "tokenizer.json").write_bytes((models / "bpe/tokenizer.json").read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_end_of_a_chat_is_taken_with_a_warning(models: Path, tmp_path: Path) -> None:
    folder = folder_with(models, tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    assert tokenizer.eod == 1
    assert tokenizer.explain_eod() == "end of document: <|im_end|>, id 1 (eos_token of tokenizer_config.json)"
    assert "--eod-token '<|endoftext|>'" in tokenizer.eod_warnings[0]
    plain = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    assert plain.eod == 0 and not plain.eod_warnings
    taken = build_tokenizer("HuggingFaceTokenizer", folder, eod_token="<|endoftext|>")
    assert taken.eod == 0 and not taken.eod_warnings and taken.explain_eod().endswith("(--eod-token)")
    assert same_tokenizer(taken, plain) and not same_tokenizer(taken, tokenizer)


@pytest.mark.parametrize(
    ("chat", "document"),
    [("<|im_end|>", "<|endoftext|>"), ("<|eot_id|>", "<|end_of_text|>"), ("<end_of_turn>", "<eos>")],
)
def test_the_ends_of_well_known_chats_are_doubted(chat: str, document: str, tmp_path: Path) -> None:
    """A folder of an instruct model says the end of a chat; a bare tokenizer.json with both says nothing."""
    special = {"<bos>", chat, document}

    def find() -> EndOfDocument | None:
        return find_end_of_document(tmp_path, token_of=lambda i: None, special=special, vocabulary=special | {"a"})

    bare = find()
    assert bare is None or bare == EndOfDocument(document, "the only special token of a well-known name")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": chat}}))
    found = find()
    assert found is not None and (found.token, found.reason) == (chat, "eos_token of tokenizer_config.json")
    assert found.warnings == (
        f"{chat} ends a message of a chat, not a document; the vocabulary has {document}: --eod-token '{document}' "
        "takes it",
    )


def test_files_that_disagree_are_named(models: Path, tmp_path: Path) -> None:
    files = {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "special_tokens_map": {"eos_token": "<|im_end|>"}}
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder_with(models, tmp_path, **files))
    assert tokenizer.eod == 0 and "special_tokens_map.json says <|im_end|>" in tokenizer.eod_warnings[0]
    files["special_tokens_map"] = {"eos_token": {"content": "<|endoftext|>"}}
    for ids, words in ((1, "generation_config.json says <|im_end|>"), ([1], "generation_config.json"), ([1, 0], None)):
        folder = folder_with(models, tmp_path, **files, generation_config={"eos_token_id": ids})
        warnings = build_tokenizer("HuggingFaceTokenizer", folder).eod_warnings
        assert words in warnings[0] if words else not warnings


def test_eod_token_is_a_special_token_of_the_model(models: Path) -> None:
    for kind, model, token, words in (
        ("HuggingFaceTokenizer", models / "bpe", "<nowhere>", "not in the vocabulary.*<|endoftext|>"),
        ("HuggingFaceTokenizer", models / "bpe", "in", "ordinary text"),
        ("SentencePieceTokenizer", models / "sp.model", "<nowhere>", "not in the vocabulary.*</s>"),
        ("ByteTokenizer", None, "</s>", "its own id 256; leave"),
    ):
        with pytest.raises(UsageError, match=f"^--eod-token {token!r}: .*{words}"):
            build_tokenizer(kind, model, eod_token=token)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="its own id 5"):
        build_tokenizer("NullTokenizer", None, vocab_size=5, eod_token="5")
    bos = build_tokenizer("SentencePieceTokenizer", models / "sp.model", eod_token="<s>")
    own = build_tokenizer("SentencePieceTokenizer", models / "sp.model")
    assert (bos.eod, own.eod) == (1, 2) and not same_tokenizer(bos, own)
    assert own.explain_eod() == "end of document: </s>, id 2 (eos_id of the model)"
    assert "257" not in build_tokenizer("ByteTokenizer", None).explain_eod()


def test_a_folder_with_one_sentencepiece_model_is_that_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "any.model").write_bytes((models / "sp.model").read_bytes())
    by_folder, own = (build_tokenizer("SentencePieceTokenizer", path) for path in (tmp_path, models / "sp.model"))
    assert same_tokenizer(by_folder, own)
    (tmp_path / "other.model").write_bytes(b"")
    with pytest.raises(UsageError, match=r"any\.model, other\.model"):
        build_tokenizer("SentencePieceTokenizer", tmp_path)


@pytest.mark.parametrize("in_folder", [False, True])
def test_models_of_other_formats_are_named(in_folder: bool, tmp_path: Path) -> None:
    tekken = {
        "config": {"pattern": "x", "default_num_special_tokens": 10},
        "vocab": [{"rank": 0, "token_bytes": "AA=="}],
    }
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    for name, content, words in (
        ("tekken.json", json.dumps(tekken), "tekken file"),
        ("cl100k_base.tiktoken", ranks, "tiktoken's ranks"),
    ):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        for kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
            with pytest.raises(UsageError, match=f"{name} is .*{words}.*tokenizer.json"):
                build_tokenizer(kind, folder if in_folder else folder / name)
