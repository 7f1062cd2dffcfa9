"""What several parts of a run know of tokenizers and vocabularies: compared pairwise, refused by name, or told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_models import train_byte_bpe

from megakd.data.agreement import (
    Side,
    one_tokenizer,
    tokenizer_of_flags,
    true_vocabulary,
    unknown_tokenizers,
)
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import MismatchError, UsageError

QWEN = {"type": "HuggingFaceTokenizer", "hash": "a" * 32, "vocab_size": 151_665, "eod": 151_643, "path": "x"}
LLAMA = {**QWEN, "hash": "b" * 32, "vocab_size": 128_256}
DATA = Side("dataset d", QWEN)


def side(name: str, tokenizer: dict[str, Any] | None, vocab_size: int | None = None, **more: bool) -> Side:
    return Side(name, tokenizer, vocab_size, **more)


def test_two_that_differ_are_refused_wherever_they_stand() -> None:
    unknown, same = side("u", None), side("the teacher t", {**QWEN, "path": "elsewhere"}, 152_064)
    assert one_tokenizer([unknown, same, DATA]) == {**QWEN, "path": "elsewhere"}
    for sides in ([DATA, side("r", LLAMA)], [unknown, DATA, same, unknown, side("r", LLAMA)], [side("r", LLAMA), DATA]):
        with pytest.raises(MismatchError, match="different tokenizers") as refusal:
            one_tokenizer(sides)
        assert "dataset d has" in str(refusal.value) and "r has" in str(refusal.value)
        assert QWEN["hash"] in str(refusal.value) and LLAMA["hash"] in str(refusal.value)
    with pytest.raises(MismatchError, match="end of document 7"):
        one_tokenizer([DATA, side("r", {**QWEN, "eod": 7})])
    assert one_tokenizer([side("--tokenizer-model f", {**QWEN, "eod": 7}, by_file=True), DATA]) == QWEN
    assert one_tokenizer([unknown]) is None


@pytest.mark.parametrize("rows", [151_665, 151_936, 152_064])
def test_rows_behind_the_tokenizers_ids_are_padding(rows: int) -> None:
    assert true_vocabulary([DATA, side("t", QWEN, rows), side("s", QWEN, 151_936)], stated=None) == 151_665


def test_a_vocabulary_that_nobody_vouches_for() -> None:
    with pytest.raises(MismatchError, match="t: vocabulary 152064, the data's tokenizer.*--vocab-size 151665"):
        true_vocabulary([DATA, side("t", None, 152_064)], stated=None)
    assert true_vocabulary([DATA, side("t", None, 152_064)], stated=151_665) == 151_665
    assert true_vocabulary([DATA, side("t", None, 151_665)], stated=None) == 151_665
    assert true_vocabulary([side("d", None), side("t", None, 152_064)], stated=None) is None
    with pytest.raises(MismatchError, match="t: vocabulary 151643, fewer than the 151665 ids of the tokenizer"):
        true_vocabulary([DATA, side("t", QWEN, 151_643)], stated=None)
    with pytest.raises(MismatchError, match="fewer than the 152064 ids of --vocab-size"):
        true_vocabulary([DATA, side("t", QWEN, 151_936)], stated=152_064)


def test_what_is_not_known_is_told_in_a_line() -> None:
    told = unknown_tokenizers([side("dataset d", None), side("the teacher t", QWEN)])
    assert told is not None and "dataset d" in told and QWEN["hash"] in told and "\n" not in told
    assert unknown_tokenizers([DATA, side("the teacher t", QWEN)]) is None
    assert unknown_tokenizers([side("dataset d", None)]) is None


def test_flags_name_a_tokenizer(tmp_path: Path) -> None:
    folder = str(train_byte_bpe(tmp_path / "bpe"))
    recorded = build_tokenizer("HuggingFaceTokenizer", folder).describe()
    given = tokenizer_of_flags(None, folder, [Side("dataset d", recorded)])
    assert given is not None and one_tokenizer([given, Side("dataset d", recorded)]) == recorded
    with pytest.raises(MismatchError, match="different tokenizers: dataset d has .*--tokenizer-model"):
        wrong = tokenizer_of_flags(None, folder, [DATA])
        assert wrong is not None
        one_tokenizer([DATA, wrong])
    with pytest.raises(MismatchError, match="--tokenizer-type ByteTokenizer, and dataset d was made with"):
        tokenizer_of_flags("ByteTokenizer", None, [DATA])
    with pytest.raises(UsageError, match="nothing records of which type"):
        tokenizer_of_flags(None, folder, [side("dataset d", None)])
    with pytest.raises(UsageError, match="no such file"):
        tokenizer_of_flags(None, str(tmp_path / "nowhere"), [DATA])
    assert tokenizer_of_flags(None, None, [DATA]) is None
    assert tokenizer_of_flags("HuggingFaceTokenizer", None, [DATA]) is None  # as recorded
