"""Checks of a frozen model against its dataset: one tokenizer, one vocabulary, and the token that ends a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megakd.data.agreement import Side, one_tokenizer, tokenizer_of_flags, true_vocabulary, unknown_tokenizers
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.boundaries import check_boundaries
from megakd.data.tokenizers.recorded import recorded_tokenizer
from megakd.errors import UsageError
from megakd.layout import is_first_rank
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.work.console import tell


def common_tokenizer(
    dataset: IndexedDataset, record: CheckpointRecord, *, tokenizer_model: str | None, vocab_size: int | None
) -> tuple[CheckpointRecord, dict[str, Any] | None]:
    """Hold the tokenizers of a dataset and a model against each other.

    tokenizer_model, vocab_size: the flags of these names; None without. Rank 0 says on stderr whose tokenizer is not
    recorded.

    Returns the record with the vocabulary of the tokenizer (the model's further rows are padding), and the tokenizer,
    None if it is not recorded anywhere.

    Raises MismatchError if the two, or the file of ``--tokenizer-model``, are known to differ, UsageError if nothing
    tells the vocabulary from its padding.
    """
    sides = [
        Side(f"dataset {dataset.prefix}", recorded_tokenizer(dataset)),
        Side(
            f"the model {record.path}",
            record.tokenizer,
            record.vocab_size,
            by_file=record.tokenizer_by_file,
            padded=record.rows is not None,
        ),
    ]
    given = tokenizer_of_flags(None, tokenizer_model, sides)
    if given is not None:  # what the dataset was made with, where nothing is recorded
        sides = [given, *(side for side in sides if side.tokenizer or side.vocab_size)]
    agreed_size = true_vocabulary(sides, stated=vocab_size)
    if agreed_size is None and record.rows is not None:
        raise UsageError(
            f"{record.path} tells {record.rows} rows of an embedding, padding among them, and {dataset.prefix} no "
            f"tokenizer: `megakd verify --adopt {dataset.prefix} --tokenizer-type T --tokenizer-model FILE` records it"
        )
    warning = unknown_tokenizers(sides)
    if warning is not None and is_first_rank():
        tell(warning)
    if agreed_size is not None:
        record = dataclasses.replace(record, vocab_size=agreed_size, rows=None)
    return record, one_tokenizer(sides)


def skipped_token(mask_policy: str, dataset: IndexedDataset, tokenizer: Mapping[str, Any] | None) -> int | None:
    """Id that ends a document besides the dataset's index: the label behind it is not scored. None: there is none.

    Raises UsageError if the mask policy needs an end-of-document id that nothing records.
    """
    if mask_policy == "all":
        return None
    return check_boundaries(dataset, tokenizer, f"--mask-policy {mask_policy}", instead="use --mask-policy all")
