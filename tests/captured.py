"""Logits stores for tests, made from a teacher's checkpoint through the project's own head and writers."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from runs import build_parts, make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.samples.selected import unselected
from megakd.logits.codec import identity_ranks
from megakd.logits.spec import StoreSpec
from megakd.logits.store_writer import finish_store, write_shard
from megakd.targets import DenseTargets
from megakd.train.preflight import check_run

TEACHER = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4}
GHOST = {"kd_tail": "ghost"}
SOME = np.random.default_rng(0).permutation(374)[:200].tolist()

# name -> the dataset, what differs from a store of every id, and of which samples
STORES: dict[str, tuple[str, dict[str, Any], list[int] | None]] = {
    "whole": ("data", {}, None),
    "whole_other": ("other", {}, None),
    "sparse": ("data", {"top_k": 12, "top_p": 0.95, "value_bits": 16}, None),
    "some": ("data", {}, SOME),
    "counts": ("data", {"kind": "samples", "draws": 30, "top_k": 0}, None),
    "drawn": ("data", {"kind": "renormalised_samples", "draws": 30, "value_bits": 16}, None),
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def make_stores(world: Worlds, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Where they are: two datasets, a teacher's checkpoint, and the stores of these names."""
    made = {name: write_dataset(folder / name, seed=seed) for seed, name in enumerate(("data", "other"))}
    made["teacher"] = str(folder / "teacher")
    tree = make_tree(made["data"], training={"train_iters": 4}, student=TEACHER, checkpoint={"save": made["teacher"]})
    assert world(1).run(run_training, tree) == [0]
    for name in names:
        data, spec, only = STORES[name]
        made[name] = str(folder / name)
        world(1).run(capture, made[data], made["teacher"], made[name], spec, only)
    return made


def stored(setting: dict[str, str], *stores: str, **groups: dict[str, Any]) -> dict[str, Any]:
    """A tree that reads stores by name; 'none' stays."""
    folders = [setting.get(store, store) for store in stores]
    return make_tree(
        setting["data"], **{**groups, "teacher": {"logits_load_dir": folders, **groups.get("teacher", {})}}
    )


@dataclass(frozen=True)
class WholeDataset:
    """All samples as one microbatch."""

    tokens_BS: NDArray[np.int64]
    num_microbatches: int = 1

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> WholeDataset:
        return self


def capture(
    data: str,
    teacher: str,
    folder: str,
    spec: dict[str, Any],
    only: Collection[int] | None = None,
) -> None:
    """In a world of one: the rows of the samples in ``only`` (all by default) of one dataset.

    spec: what differs from a top_p_k store of 32 bits that lists the whole vocabulary.
    """
    import torch

    from megakd.logits.sparsify import renormalised_samples, sampled_counts, top_p_k, uniform_numbers
    from megakd.losses.read import read_head
    from megakd.parallel import init_parallel

    config = make_config(make_tree(data, teacher={"load": teacher}))
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    samples = unselected(plan.blend.datasets[0])
    assert plan.teacher is not None
    store = StoreSpec(
        **{
            "kind": "top_p_k",
            "vocab_size": plan.vocab_size,
            "packing": samples.packing,
            "seq_length": samples.seq_length,
            "num_samples": samples.num_samples,
            "shard_samples": 100,
            "parents": {"dataset": samples.dataset.fingerprint, "model": plan.teacher.fingerprint},
            "tokenizer": plan.tokenizer,
            "value_bits": 32,
            "top_k": plan.vocab_size,
            **spec,
        }
    )
    groups_of_one = init_parallel(config.parallel, seed=1)
    ids = np.arange(samples.num_samples)
    tokens_BS = samples.read(ids)[:, :-1]
    lengths = np.minimum(samples.lengths(ids) - 1, samples.seq_length)
    _, teacher_of_one, objective, _ = build_parts(config, plan, groups_of_one)
    (targets,) = teacher_of_one.targets(WholeDataset(tokens_BS))  # type: ignore[arg-type]
    assert isinstance(targets, DenseTargets)
    shard = objective.shard
    hidden_BSH = targets.hidden_TH.reshape(samples.seq_length, samples.num_samples, -1).transpose(0, 1)
    positions_T = (samples.starts(ids)[:, None] + np.arange(samples.seq_length)).reshape(-1)
    read = read_head(
        hidden_BSH.flatten(0, 1),
        targets.weight_vH,
        shard=shard,
        entropy=True,
        top_k=plan.vocab_size,
        uniforms_TN=torch.from_numpy(uniform_numbers(positions_T, store.draws or 1, seed=store.seed, dataset="x")),
    )
    assert read.entropy_T is not None and read.drawn_ids_TN is not None
    assert read.top_ids_TK is not None and read.top_log_probs_TK is not None
    ranks = identity_ranks(plan.vocab_size)
    for number in range(store.num_shards):
        writer = write_shard(folder, store, ranks, number)
        for sample in range(*store.samples_of(number)):
            if only is not None and sample not in only:
                continue
            own = slice(sample * samples.seq_length, sample * samples.seq_length + int(lengths[sample]))
            entropy_T, drawn_TN = read.entropy_T[own], read.drawn_ids_TN[own]
            best_TK, log_probs_TK = read.top_ids_TK[own], read.top_log_probs_TK[own]
            if store.kind == "samples":
                rows = sampled_counts(drawn_TN, entropy_T)
            elif store.kind == "top_p_k":
                rows = top_p_k(best_TK[:, : store.top_k], log_probs_TK[:, : store.top_k], entropy_T, top_p=store.top_p)
            else:
                drawn_log_probs_TN = log_probs_TK.gather(1, best_TK.argsort(1)).gather(1, drawn_TN)
                rows = renormalised_samples(drawn_TN, drawn_log_probs_TN, entropy_T)
            writer.add(sample, tokens_BS[sample, : int(lengths[sample])], rows)
        writer.commit()
    finish_store(Path(folder), store, ranks)
