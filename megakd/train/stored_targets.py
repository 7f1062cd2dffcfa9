"""Logits stores that a run reads: opened, and compared with its data and its loss. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megakd.data.agreement import Side, true_vocabulary
from megakd.data.blend import Blend
from megakd.data.samples.protocol import Samples
from megakd.data.samples.selected import unselected
from megakd.data.tokenizers.recorded import recorded_tokenizer
from megakd.errors import MismatchError, UsageError
from megakd.logits.store import LogitsStore
from megakd.train.objective.config import ObjectiveConfig

WITHOUT = "none"


def open_stores(
    folders: Sequence[str],
    blend: Blend,
    *,
    flag: str,
    tokenizer: Mapping[str, Any] | None,
    vocab_size: int,
) -> tuple[LogitsStore | None, ...]:
    """Open one store for each dataset of the blend, None for a dataset without; an empty tuple without folders.

    flag: the flag that gave the folders.

    Raises UsageError for a number of folders that is not that of the datasets and for stores of several kinds,
    MismatchError for a store of other data, CorruptError for a store that is not whole.
    """
    if folders and len(folders) != len(blend.datasets):
        raise UsageError(
            f"{flag} has {len(folders)} entries for {len(blend.datasets)} datasets: one folder for each, in their "
            f"order; '{WITHOUT}' for a dataset without stored targets"
        )
    stores = tuple(
        None if folder == WITHOUT else _open_store(folder, samples, flag, tokenizer, vocab_size)
        for folder, samples in zip(folders, blend.datasets)
    )
    opened = [store for store in stores if store is not None]
    for store in opened[1:]:
        if store.spec.kind != opened[0].spec.kind:
            raise UsageError(
                f"{flag}: {opened[0].folder} holds {opened[0].spec.kind}, {store.folder} {store.spec.kind}: a "
                "run takes stores of one kind"
            )
    return stores


def _open_store(
    folder: str, samples: Samples, flag: str, tokenizer: Mapping[str, Any] | None, vocab_size: int
) -> LogitsStore:
    all_samples = unselected(samples)
    try:
        store = LogitsStore(
            folder,
            dataset=samples.dataset.fingerprint,
            packing=all_samples.packing,
            seq_length=samples.seq_length,
        )
    except UsageError as error:
        raise UsageError(
            f"{flag}: {error}; expected a folder that 'megakd capture' or 'megakd collect' has finished: run its "
            "command again to finish it"
        ) from error
    # the store is of this dataset, as was checked: a tokenizer that it does not record is the dataset's
    made_with = store.spec.tokenizer or recorded_tokenizer(samples.dataset)
    sides = [Side("the data", tokenizer), Side(f"the logits store {folder}", made_with, store.spec.vocab_size)]
    # a student may have more rows than the tokenizer has ids: the store need not cover ids that do not exist
    true_vocabulary(sides, stated=min(vocab_size, int((tokenizer or {}).get("vocab_size", vocab_size))))
    if store.spec.num_samples != all_samples.num_samples:
        raise MismatchError(
            f"{folder}: a store with a number of samples of {store.spec.num_samples}, expected "
            f"{all_samples.num_samples}"
        )
    return store


def check_stores(stores: Sequence[LogitsStore | None], objective: ObjectiveConfig) -> None:
    """Refuse a loss that is wrong for the kind of the stores. Raises UsageError, which names a loss that is right."""
    store = next((store for store in stores if store is not None), None)
    if store is None:
        return
    kind, shape = store.spec.kind, objective.kd_temperature_schedule
    try:
        objective.kd_term().check(kind)
    except UsageError as error:
        raise UsageError(f"{store.folder}: {error} (--kd-divergence, --kd-tail, --kd-temperature)") from None
    if shape != "constant" and not (kind == "top_p_k" and objective.kd_tail == "renormalise"):
        raise UsageError(
            f"{store.folder}: --kd-temperature-schedule {shape} on {kind} targets with --kd-tail {objective.kd_tail}: "
            "what the ids that are not listed weigh at another temperature is unknown; use constant, or top_p_k with "
            "--kd-tail renormalise"
        )
