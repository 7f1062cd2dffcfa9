"""A logits store from a wider one: every row cut to fewer ids, without asking the teacher again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megakd.data.samples.protocol import Samples
from megakd.errors import UsageError
from megakd.logits.codec import Rows, invert
from megakd.logits.sparsify import top_p_k
from megakd.logits.spec import read_ids_of_ranks
from megakd.logits.store import LogitsStore
from megakd.logits.store_writer import finish_store, read_shard, write_shard


def truncate_store(source: Path, output: Path, samples: Samples, *, top_p: float, top_k: int) -> None:
    """Write to ``output`` the store that ``megakd capture --top-p --top-k`` would have made, but for the rounding of
    values that ``source`` has stored. What is there of it already is kept.

    samples: all of the dataset that ``source`` was captured from.

    Raises UsageError where ``source`` lists less than is asked for.
    """
    store = LogitsStore(source, dataset=samples.dataset.fingerprint, packing=samples.packing)
    there = store.spec
    if there.kind != "top_p_k" or there.top_k < top_k or there.top_p < top_p:
        raise UsageError(
            f"{source} holds {there.kind}, top-p {there.top_p}, top-k {there.top_k}; expected top_p_k with at least "
            f"{top_p} and {top_k}"
        )
    spec = replace(there, top_p=top_p, top_k=top_k, details={**there.details, "cut_from": store.fingerprint})
    ranks = invert(read_ids_of_ranks(store.manifest))
    for shard in range(spec.num_shards):
        if read_shard(output, spec, ranks, shard) is not None:
            continue
        writer = write_shard(output, spec, ranks, shard)
        ids = np.array([sample for sample in range(*spec.samples_of(shard)) if store.has_targets(sample)], np.int64)
        if len(ids):
            inputs = samples.read(ids)[:, :-1]
            for sample, input_ids in zip(ids.tolist(), inputs):
                rows = store.read(sample, input_ids)
                assert rows is not None  # it has targets
                writer.add(sample, input_ids[: rows.num_rows], cut(rows, top_p=top_p, top_k=top_k))
        writer.commit()
    finish_store(output, spec, ranks)


def cut(rows: Rows, *, top_p: float, top_k: int) -> Rows:
    """The most likely ids of each row, at most ``top_k``, and of them the shortest prefix with mass ``top_p``."""
    order = np.argsort(-rows.log_probs_TK, axis=1, kind="stable")[:, :top_k]
    ids_TK, log_probs_TK = (np.take_along_axis(values, order, 1) for values in (rows.ids_TK, rows.log_probs_TK))
    entropy_T = torch.from_numpy(rows.entropy_T)
    return top_p_k(torch.from_numpy(ids_TK), torch.from_numpy(log_probs_TK), entropy_T, top_p=top_p)
