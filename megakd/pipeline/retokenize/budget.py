"""Budget of bad documents: a run that can no longer keep it stops, and says what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson

from megakd.data.corpus_shard import LISTED, write_quarantine
from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import DataBudgetError
from megakd.pipeline.retokenize.config import RetokenizeConfig
from megakd.pipeline.retokenize.shards import RetokenizeCounts, RetokenizedShard, RetokenizeSettings, read_shard


def list_bad_documents(config: RetokenizeConfig, shards: Sequence[RetokenizedShard]) -> Path:
    """List the documents whose text did not survive, in their order; without any, no such file is left."""
    return write_quarantine(config.output_prefix, (line for shard in shards for line in shard.bad_lines()))


def check_still_possible(
    config: RetokenizeConfig, settings: RetokenizeSettings, dataset: IndexedDataset, num_bad: int, *, num_shards: int
) -> None:
    """Raise DataBudgetError once more documents are bad than are allowed of the whole dataset.

    num_bad: bad documents so far. num_shards: shards that may be committed; the bad documents of these are listed.
    """
    if num_bad <= config.bad_budget * dataset.num_documents:
        return
    done = [read_shard(settings.folder, number, verify=False) for number in range(num_shards)]
    path = list_bad_documents(config, [shard for shard in done if shard is not None])
    listed = f"; some are in {path}" if path.exists() else ""
    raise DataBudgetError(
        f"the text of {num_bad} documents did not survive so far, more than {config.allowance} allows of the "
        f"{dataset.num_documents} that there are{listed}. Is it the tokenizer that made them "
        "(--source-tokenizer-model)? With a larger budget the same command continues from what is done"
    )


def check_counts(config: RetokenizeConfig, counts: RetokenizeCounts) -> None:
    """Raise DataBudgetError if a finished dataset has more bad documents than are allowed now."""
    if counts.bad_documents > config.bad_budget * counts.documents:
        raise DataBudgetError(
            f"{config.output_prefix}: the text of {counts.bad_documents} of {counts.documents} documents did not "
            "survive when it was made, more than is allowed now"
        )


def check_budget(config: RetokenizeConfig, counts: RetokenizeCounts, quarantine: Path) -> None:
    """Raise DataBudgetError for more bad documents than are allowed. quarantine: their list, quoted in the message."""
    if counts.bad_documents > config.bad_budget * counts.documents:
        with open(quarantine, "rb") as stream:
            first = orjson.loads(stream.readline())
        listed = "all" if counts.bad_documents <= LISTED else f"the first {LISTED}"
        raise DataBudgetError(
            f"the text of {counts.bad_documents} of {counts.documents} documents does not survive, more than "
            f"{config.allowance} allows: {counts.undecodable} were not all text, {counts.normalised} are normalised "
            f"by the new tokenizer; {listed} are in {quarantine}; the first is document {first['document']}: "
            f"{first['reason']} {first['detail']}. With a larger budget the same command finishes from what is done"
        )
