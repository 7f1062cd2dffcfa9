"""Trainers of tokenizers: from texts to the files of a tokenizer that loses nothing."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megakd.data.tokenizer import TokenizerType
from megakd.errors import UsageError

TrainerType = Literal["byte-bpe", "sentencepiece-bpe", "sentencepiece-unigram"]

_LINE_CHARACTERS = 2000  # sentencepiece leaves out lines longer than its bound, 4192 bytes by default
_LINE_BYTES = 4 * _LINE_CHARACTERS
# Pattern of GPT-4, Llama 3 and Qwen for the words in which pairs are joined; digits in groups of three, or alone.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Trainer:
    """Training algorithm, with Megatron's name of the tokenizers that it makes."""

    tokenizer_type: TokenizerType
    train: Callable[..., dict[str, bytes]]
    """Function of texts, number of ids, special tokens with the end of document first, and ``split_digits``; returns
    the content of each file by its name."""


def train_byte_bpe(
    texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str], *, split_digits: bool
) -> dict[str, bytes]:
    """Train byte-level BPE: a tokenizer.json, and the tokenizer_config.json that names the end-of-document token.

    Raises UsageError where the text has too few pairs for ``vocab_size`` ids.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # with threads, the order of sums could break ties otherwise
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = _WORDS.replace("DIGITS", "" if split_digits else "{1,3}")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    num_ids = tokenizer.get_vocab_size(with_added_tokens=True)
    if num_ids < vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size}: the text has pairs for {num_ids} ids; ask for fewer, or give more text"
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special_tokens[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def train_sentencepiece(
    texts: Sequence[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    split_digits: bool,
    model_type: Literal["bpe", "unigram"],
) -> dict[str, bytes]:
    """Train a sentencepiece model with a piece for each byte; it neither normalises text nor adds or removes spaces.

    Raises UsageError for a ``vocab_size`` that the text cannot give.
    """
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": split_digits,
        "unk_id": 0,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
        "eos_piece": special_tokens[0],
        "control_symbols": list(special_tokens[1:]),
        "max_sentence_length": _LINE_BYTES,
        "num_threads": 1,
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            **settings,
        )
    except RuntimeError as error:
        raise UsageError(f"--vocab-size {vocab_size}: sentencepiece: {' '.join(str(error).split())[:300]}") from error
    return {"tokenizer.model": model.getvalue()}


TRAINERS: dict[TrainerType, Trainer] = {
    "byte-bpe": Trainer("HuggingFaceTokenizer", train_byte_bpe),
    "sentencepiece-bpe": Trainer("SentencePieceTokenizer", partial(train_sentencepiece, model_type="bpe")),
    "sentencepiece-unigram": Trainer("SentencePieceTokenizer", partial(train_sentencepiece, model_type="unigram")),
}


def _lines(texts: Sequence[str]) -> Iterator[str]:
    """Lines of all texts, long ones cut; a line feed is a byte of its own to these models, joined with no other."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]
