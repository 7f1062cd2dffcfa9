"""Checks of ``megakd generate`` before torch is loaded: model, tokenizer, prompts and their lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.data.tokenizer import Tokenizer, UnencodableError
from megakd.data.tokenizers.end_of_document import generation_ends
from megakd.data.tokenizers.recorded import open_recorded
from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import CheckpointRecord, read_record
from megakd.model.config import ModelShape
from megakd.pipeline.generate.config import GenerateConfig


@dataclass(frozen=True)
class Prompt:
    """A text to continue, its tokens, and how many more there may be."""

    text: str
    ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class GeneratePlan:
    """The configuration checked against what is on disk.

    stop_ids: tokens that end a text. positions: most tokens of a prompt and its text; None without a bound. cut: number
    of prompts whose texts must end before ``--num-tokens-to-generate``, because the model has no more positions.
    """

    record: CheckpointRecord
    shape: ModelShape
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    stop_ids: frozenset[int]
    positions: int | None
    cut: int


def check_generate(config: GenerateConfig, world_size: int) -> GeneratePlan:
    """Refuse flags, files and prompts that cannot work together, and return what the run needs of them.

    Raises UsageError, MismatchError for a tokenizer that is not the model's, CorruptError.
    """
    config.parallel().data_parallel_size(world_size)
    record = read_record(
        config.load, config.iteration, role="--load", flag="--iteration", shape=config.described_shape()
    )
    if record.shape.num_experts and config.tensor_model_parallel_size > 1:
        raise UsageError(
            f"--load {record.path} has {record.shape.num_experts} experts a layer, which "
            f"--tensor-model-parallel-size {config.tensor_model_parallel_size} cannot split while tokens are read one "
            "by one: use --pipeline-model-parallel-size"
        )
    bf16 = record.shape.bf16 if config.bf16 is None else config.bf16
    shape = record.shape.frozen(
        transformer_impl=config.transformer_impl, bf16=bf16, fp8_format=None, fp8_recipe=record.shape.fp8_recipe
    )
    shape.check_layout(config.parallel(), "--load")
    tokenizer = open_recorded(
        record.tokenizer,
        f"the model {record.path}",
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
    )
    record = record.of_vocabulary(tokenizer.vocab_size)
    if record.vocab_size < tokenizer.vocab_size:
        raise MismatchError(
            f"the model {record.path} has a vocabulary of {record.vocab_size} ids, the tokenizer {tokenizer.path} "
            f"{tokenizer.vocab_size}: it is another model's; --tokenizer-model says where the right one is"
        )
    positions = _positions(config, record)
    wanted = config.num_tokens_to_generate
    begin = _begin_of_text(config, tokenizer)
    prompts = [
        _prompt(number, text, tokenizer, begin, positions, wanted)
        for number, text in enumerate(_texts(config), start=1)
    ]
    cut = sum(prompt.max_new_tokens < wanted for prompt in prompts)
    return GeneratePlan(record, shape, tokenizer, prompts, _stop_ids(config, tokenizer), positions, cut)


def _positions(config: GenerateConfig, record: CheckpointRecord) -> int | None:
    """Return the most tokens of a prompt and its text; those of a sliding window see the same without it.

    Raises UsageError for ``--seq-length`` beyond a window.
    """
    if config.seq_length is not None:
        record.shape.check_sequence(config.seq_length, f"--load {record.path}")
    lengths = (record.seq_length, record.shape.sliding_window)
    return config.seq_length or min((length for length in lengths if length), default=None)


def _begin_of_text(config: GenerateConfig, tokenizer: Tokenizer) -> int | None:
    """Return the token that goes before every prompt, by ``--add-bos-token`` or by the tokenizer's template; or None.

    Raises UsageError if one is asked for that the tokenizer's files do not name.
    """
    if config.add_bos_token and tokenizer.bos is None:
        raise UsageError(
            f"--add-bos-token: the files of the tokenizer {tokenizer.path or tokenizer.type} name no bos_token"
        )
    if config.add_bos_token is None and tokenizer.encode_in_template("a")[:1] != [tokenizer.bos]:
        return None
    return None if config.add_bos_token is False else tokenizer.bos


def _stop_ids(config: GenerateConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """End of a document, and what a Hugging Face model's own files name as the end of what it writes."""
    if config.ignore_eod:
        return frozenset()
    ends = set() if tokenizer.eod is None else {tokenizer.eod}
    if tokenizer.type == "HuggingFaceTokenizer" and tokenizer.path is not None:
        ends |= set(generation_ends(tokenizer.path.parent))
    return frozenset(ends)


def _prompt(
    number: int, text: str, tokenizer: Tokenizer, begin: int | None, positions: int | None, wanted: int
) -> Prompt:
    try:
        text.encode()  # bytes of a command line that are no UTF-8 come as halves of surrogate pairs
        ids = tuple(tokenizer.encode(text))
    except UnicodeEncodeError as error:
        raise UsageError(
            f"prompt {number} is {text[:60]!r}, which is no UTF-8 from character {error.start + 1} on; expected text"
        ) from None
    except UnencodableError as error:
        raise UsageError(f"prompt {number}: {text[:60]!r}: {error}") from None
    if begin is not None and ids[:1] != (begin,):
        ids = (begin, *ids)
    if not ids:
        end = "" if tokenizer.eod_token is None else f"; {tokenizer.eod_token!r} begins a document"
        raise UsageError(f"prompt {number} is {text!r}, which has no token: a model continues at least one{end}")
    if positions is None:
        return Prompt(text, ids, wanted)
    if len(ids) >= positions:
        raise UsageError(
            f"prompt {number} has {len(ids)} tokens ({text[:40]!r} ...), the model {positions} positions for prompt "
            "and text: shorten it, or --seq-length N takes more than the model was trained with"
        )
    return Prompt(text, ids, min(wanted, positions - len(ids)))


def _texts(config: GenerateConfig) -> list[str]:
    if config.prompts_file is None:
        return config.prompt
    path = Path(config.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"no UTF-8: {error}"
        raise UsageError(f"--prompts-file {path}: cannot be read: {reason}") from None
    if path.suffix == ".jsonl":
        texts = [_text_of(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        texts = [line for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"--prompts-file {path}: holds no prompt; expected one a line")
    return texts


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--prompts-file {path}: line {number} is no JSON: {error}") from None
    text = (value.get("prompt", value.get("text")) if isinstance(value, dict) else value) or None
    if not isinstance(text, str):
        raise UsageError(
            f"--prompts-file {path}: line {number} is {line[:60]!r}; expected an object with a text under prompt or "
            "text"
        )
    return text
