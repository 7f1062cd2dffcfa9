"""One tokenizer and one vocabulary: what each part of a run records of them, held against what the others do.

The vocabulary is the tokenizer's. A model may have more rows than that (151,936 or 152,064 for 151,665 ids): those
behind the last id are padding, whoever trained it, and take no part in any softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.data.tokenizer import build_tokenizer, name_tokenizer
from megakd.errors import MismatchError, UsageError


@dataclass(frozen=True)
class Side:
    """Somebody who knows ids: a dataset, a model, a logits store, scores, flags.

    name: for messages. tokenizer: what is recorded; None where nothing is. vocab_size: how many ids its distributions
    have; None where it has none. by_flags: a tokenizer's file alone, which does not say what ends a document here.
    padded: vocab_size counts rows, padding among them, as a checkpoint of Megatron-LM records no more.
    """

    name: str
    tokenizer: Mapping[str, Any] | None
    vocab_size: int | None = None
    by_flags: bool = False
    padded: bool = False


def one_tokenizer(sides: Sequence[Side]) -> dict[str, Any] | None:
    """The tokenizer of all sides, None where none of them records any.

    Raises MismatchError for two that differ, with both names.
    """
    known = [side for side in sides if side.tokenizer is not None]
    for index, one in enumerate(known):
        for other in known[index + 1 :]:
            _check_pair(one, other)
    best = next((side for side in known if not side.by_flags), known[0] if known else None)
    return None if best is None or best.tokenizer is None else dict(best.tokenizer)


def unknown_tokenizers(sides: Sequence[Side]) -> str | None:
    """One line on whose tokenizer is not known, where there is anything to hold it against; None where all are."""
    unknown = [side.name for side in sides if side.tokenizer is None]
    if not unknown or len(sides) < 2:
        return None
    known = next((side for side in sides if side.tokenizer is not None), None)
    than = "" if known is None or known.tokenizer is None else f" ({known.name}: {name_tokenizer(known.tokenizer)})"
    return (
        f"Warning: no tokenizer is recorded for {', '.join(unknown)}: that the ids of all mean the same text is not "
        f"checked{than}; 'megakd verify --adopt' records a dataset's"
    )


def true_vocabulary(sides: Sequence[Side], *, stated: int | None) -> int | None:
    """The number of ids: ``stated`` (by a flag), or the tokenizer's; None where neither is known. Rows that a side has
    beyond it are padding.

    Raises MismatchError for a side with fewer ids, and for one with more of which it is not known that its tokenizer is
    the same.
    """
    tokenizer = one_tokenizer(sides)
    vocab_size = stated if stated is not None else None if tokenizer is None else int(tokenizer["vocab_size"])
    if vocab_size is None:
        return None
    for side in sides:
        if side.vocab_size is None or side.vocab_size == vocab_size:
            continue
        if side.vocab_size < vocab_size:
            raise MismatchError(
                f"{side.name}: vocabulary {side.vocab_size}, fewer than the {vocab_size} ids of "
                f"{'--vocab-size' if stated is not None else 'the tokenizer'}: it cannot say anything about the others"
            )
        if stated is None and side.tokenizer is None and not side.padded:
            raise MismatchError(
                f"{side.name}: vocabulary {side.vocab_size}, the data's tokenizer has {vocab_size} ids, and nothing "
                f"records that it is the same tokenizer: if it is, and ids from {vocab_size} on are padding, say "
                f"--vocab-size {vocab_size}"
            )
    return vocab_size


def tokenizer_of_flags(
    tokenizer_type: str | None, tokenizer_model: str | None, recorded: Sequence[Side], *, vocab_size: int | None = None
) -> Side | None:
    """The tokenizer that flags name, opened; None where they name no file, and no type that needs none.

    recorded: sides that may say of which type it is. vocab_size: of a NullTokenizer, its end of document included.

    Raises UsageError for a file that is not there, or one of which no type is known; MismatchError for another type
    than is recorded.
    """
    if tokenizer_type is None and tokenizer_model is None:
        return None
    known = next((side for side in recorded if side.tokenizer is not None), None)
    kind: Any = tokenizer_type
    if known is not None and known.tokenizer is not None:
        kind = tokenizer_type or known.tokenizer["type"]
        if kind != known.tokenizer["type"]:
            raise MismatchError(
                f"--tokenizer-type {kind}, and {known.name} was made with {name_tokenizer(known.tokenizer)}"
            )
        if kind == "NullTokenizer" and vocab_size is None:
            vocab_size = int(known.tokenizer["vocab_size"])
    if kind is None:
        raise UsageError(
            f"--tokenizer-model {tokenizer_model}: nothing records of which type it is: add --tokenizer-type, or "
            "record it beside the dataset with 'megakd verify --adopt'"
        )
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise UsageError("--tokenizer-type NullTokenizer: its size is not recorded: add --vocab-size")
        return None  # no file that could be another one
    if tokenizer_model is None and kind != "ByteTokenizer":
        if known is None:
            raise UsageError(f"--tokenizer-type {kind}: nothing records its file: add --tokenizer-model")
        return None  # the recorded one, of this type
    tokenizer = build_tokenizer(kind, tokenizer_model, type_flag="--tokenizer-type" if tokenizer_type else None)
    return Side(f"--tokenizer-model {tokenizer_model}", tokenizer.describe(), by_flags=True)


def _check_pair(one: Side, other: Side) -> None:
    assert one.tokenizer is not None and other.tokenizer is not None
    keys = ("type", "hash", "vocab_size") + (() if one.by_flags or other.by_flags else ("eod",))
    if any(one.tokenizer[key] != other.tokenizer[key] for key in keys):
        raise MismatchError(
            f"different tokenizers: {one.name} has {_name(one.tokenizer, other.tokenizer)}, {other.name} has "
            f"{_name(other.tokenizer, one.tokenizer)}: the same ids are other tokens; 'megakd retokenize' makes a "
            "dataset in another tokenizer's"
        )


def _name(tokenizer: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    plain = name_tokenizer(tokenizer)
    return plain if plain != name_tokenizer(other) else f"{plain}, end of document {tokenizer['eod']}"
