"""The tokenizer with which a dataset or a model was made, opened again from the record in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer, name_tokenizer, same_tokenizer
from megakd.errors import MismatchError, UsageError


def recorded_tokenizer(dataset: IndexedDataset) -> Mapping[str, Any] | None:
    """Record of the tokenizer in a dataset's manifest; None where there is no record, or no manifest."""
    return None if dataset.manifest is None else dataset.manifest.tokenizer


def end_as_recorded(tokenizer: Tokenizer, recorded: Mapping[str, Any]) -> None:
    """Let a tokenizer end documents with the recorded id, which ``--eod-token`` may have chosen."""
    eod = recorded.get("eod")
    if tokenizer.path is not None and isinstance(eod, int) and eod != tokenizer.eod and eod < tokenizer.vocab_size:
        tokenizer.end_documents_with(eod)


def open_tokenizer(
    dataset: IndexedDataset,
    *,
    tokenizer_type: TokenizerType | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    flag_prefix: str = "--",
) -> Tokenizer:
    """Open the dataset's tokenizer. The arguments replace what is not recorded, or say where its file lies now.

    flag_prefix: beginning of the names of these arguments' flags, for messages.

    Raises UsageError where the tokenizer is not known or its file is missing, MismatchError for a tokenizer that is not
    the dataset's.
    """
    recorded = dict(recorded_tokenizer(dataset) or {})
    kind = tokenizer_type or recorded.get("type")
    if kind is None:
        raise UsageError(
            f"{dataset.prefix}: its tokenizer is not recorded: say which it was with {flag_prefix}tokenizer-type and "
            f"{flag_prefix}tokenizer-model"
        )
    model = tokenizer_model or recorded.get("path")
    if kind == "NullTokenizer" and vocab_size is None and recorded.get("type") == kind:
        vocab_size = int(recorded["vocab_size"]) - 1  # its end of document comes on top
    flag = f"{flag_prefix}tokenizer-model"
    tokenizer = _build_as_recorded(
        recorded,
        str(dataset.prefix),
        kind,
        model,
        vocab_size=vocab_size,
        model_flag=flag,
        type_flag=f"{flag_prefix}tokenizer-type" if tokenizer_type else None,
        hint="" if tokenizer_type else f"; the dataset records a {kind}: {flag} says where its file is now",
    )
    largest = dataset.max_token_id
    if largest is not None and largest >= tokenizer.vocab_size:
        raise MismatchError(f"{dataset.prefix}: token id {largest}, the tokenizer has {tokenizer.vocab_size} entries")
    return tokenizer


def open_recorded(
    recorded: Mapping[str, Any] | None,
    owner: str,
    *,
    tokenizer_type: TokenizerType | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Open the tokenizer that a manifest records. The arguments say where its file lies now, or replace the record.

    recorded: the record; None if there is none. owner: what it belongs to, for messages, such as "the model runs/a".
    vocab_size: number of ids of a NullTokenizer that is not recorded.

    Raises UsageError where the tokenizer is not known or its file is missing, MismatchError for another tokenizer than
    the recorded one.
    """
    record = dict(recorded or {})
    kind = tokenizer_type or record.get("type")
    if kind is None:
        raise UsageError(
            f"{owner}: its tokenizer is not recorded: say which it is with --tokenizer-type and --tokenizer-model"
        )
    if kind == "NullTokenizer" and record.get("type") == kind:
        vocab_size = int(record["vocab_size"]) - 1  # its end of document comes on top
    moved = f"; {owner} records a {kind}: --tokenizer-model says where its file is now"
    return _build_as_recorded(
        record,
        owner,
        kind,
        tokenizer_model or record.get("path"),
        vocab_size=vocab_size,
        model_flag="--tokenizer-model",
        type_flag="--tokenizer-type" if tokenizer_type else None,
        hint=moved if record and not tokenizer_model else "",
    )


def _build_as_recorded(
    record: Mapping[str, Any],
    owner: str,
    kind: Any,
    model: Any,
    *,
    vocab_size: int | None,
    model_flag: str,
    type_flag: str | None,
    hint: str,
) -> Tokenizer:
    """Build the tokenizer and hold it against its record, which is empty if there is none. hint: ends a message.

    Raises UsageError where it cannot be opened, MismatchError for another one than the recorded.
    """
    try:
        tokenizer = build_tokenizer(kind, model, vocab_size=vocab_size, model_flag=model_flag, type_flag=type_flag)
    except UsageError as error:
        raise UsageError(f"{owner}: opening its tokenizer: {error}{hint}") from error
    end_as_recorded(tokenizer, record)
    if record and not same_tokenizer(record, tokenizer):
        raise MismatchError(
            f"{owner}: made with the tokenizer {name_tokenizer(record)}; the one given is {name_tokenizer(tokenizer)}"
        )
    return tokenizer
