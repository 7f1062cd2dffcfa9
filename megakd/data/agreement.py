"""Agreement of all parts of a run on one tokenizer and one vocabulary, by what each part records.

The vocabulary is the tokenizer's. A model may have more rows than that (151,936 or 152,064 for 151,665 ids): the rows
behind the last id are padding, whoever trained the model, and take no part in any softmax.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.data.tokenizer import build_tokenizer, name_tokenizer
from megakd.data.tokenizers.recorded import end_as_recorded
from megakd.errors import MismatchError, UsageError


@dataclass(frozen=True)
class Side:
    """One part of a run that has token ids: a dataset, a model, a logits store, scores or flags.

    name: for messages. tokenizer: the recorded one, or None. vocab_size: number of ids of its distributions; None
    without distributions. by_file: known only by the tokenizer's file, as a flag's or that of a Hugging Face folder,
    which does not tell how documents of a corpus end.
    padded: ``vocab_size`` counts rows with padding, because a checkpoint of Megatron-LM records nothing else.
    """

    name: str
    tokenizer: Mapping[str, Any] | None
    vocab_size: int | None = None
    by_file: bool = False
    padded: bool = False


def one_tokenizer(sides: Sequence[Side]) -> dict[str, Any] | None:
    """Tokenizer of all sides; None if no side records one.

    Raises MismatchError, with both names, for two sides whose tokenizers differ.
    """
    known = [side for side in sides if side.tokenizer is not None]
    for left, right in itertools.combinations(known, 2):
        _check_pair(left, right)
    best = next((side for side in known if not side.by_file), known[0] if known else None)
    return None if best is None or best.tokenizer is None else dict(best.tokenizer)


def unknown_tokenizers(sides: Sequence[Side]) -> str | None:
    """Warning that names the sides whose tokenizer is not recorded; None if all are, or there is only one side."""
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
    """Number of token ids: ``stated`` (by a flag), or the tokenizer's; None if neither is known.

    Further rows of a side are padding. Raises MismatchError for a side with fewer ids, and for a side with more whose
    tokenizer is not known to be the same.
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
    """Open the tokenizer that flags name; None if they name neither a file nor a type that needs none.

    recorded: sides that may record its type. vocab_size: for a NullTokenizer, its end-of-document id included.

    Raises UsageError for a missing file, or one whose type is not known, MismatchError for another type than the
    recorded one.
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
    return Side(f"--tokenizer-model {tokenizer_model}", tokenizer.describe(), by_file=True)


def _check_pair(left: Side, right: Side) -> None:
    assert left.tokenizer is not None and right.tokenizer is not None
    first, second = _ending_like(left, right.tokenizer), _ending_like(right, left.tokenizer)
    keys = ("type", "hash", "vocab_size") + (() if left.by_file or right.by_file else ("eod",))
    if any(first[key] != second[key] for key in keys):
        raise MismatchError(
            f"different tokenizers: {left.name} has {_name(left.tokenizer, right.tokenizer)}, {right.name} has "
            f"{_name(right.tokenizer, left.tokenizer)}: the same ids are other tokens; 'megakd retokenize' makes a "
            "dataset in another tokenizer's"
        )


def _ending_like(side: Side, other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a side's tokenizer; if its file alone is known, with the other's id at the end of documents.

    The hash covers that id, which ``--eod-token`` may have chosen for a dataset.
    """
    assert side.tokenizer is not None
    path = side.tokenizer.get("path")
    if not side.by_file or side.tokenizer["eod"] == other["eod"] or path is None or not Path(path).exists():
        return side.tokenizer
    tokenizer = build_tokenizer(side.tokenizer["type"], path, type_flag=None)
    end_as_recorded(tokenizer, side.tokenizer)
    if tokenizer.hash != side.tokenizer["hash"]:
        return side.tokenizer  # the file has changed since
    end_as_recorded(tokenizer, other)
    return tokenizer.describe()


def _name(tokenizer: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    plain = name_tokenizer(tokenizer)
    return plain if plain != name_tokenizer(other) else f"{plain}, end of document {tokenizer['eod']}"
