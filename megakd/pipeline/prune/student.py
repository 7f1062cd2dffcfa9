"""Shape of the student: the teacher's, with the sizes that are asked for."""

from __future__ import annotations

import dataclasses

from megakd.errors import UsageError
from megakd.model.config import ModelConfig, ModelShape
from megakd.pipeline.prune.config import SIZES, PruneConfig


def student_shape(config: PruneConfig, teacher: ModelShape) -> ModelShape:
    """Return the shape of the student.

    The width of a head is kept, and so is everything else that no size is: biases, norms, positions, tied embeddings.

    Raises:
        UsageError: a size is larger than the teacher's, or does not divide; the message has both values.
    """
    if teacher.num_experts:
        raise UsageError(
            f"--load has {teacher.num_experts} experts a layer: experts are not pruned here; take a dense teacher"
        )
    sizes = {name: getattr(config, name) for name in SIZES}
    if config.preset is not None:
        named = ModelConfig(preset=config.preset)
        named.validate()
        preset = named.resolve("--preset")
        sizes = {name: getattr(preset, name) if value is None else value for name, value in sizes.items()}
    if config.prune_layers is not None:
        _check_layers(config.prune_layers, teacher.num_layers)
        sizes["num_layers"] = teacher.num_layers - len(config.prune_layers)
    if teacher.no_rope_freq is not None and sizes["num_layers"] not in (None, teacher.num_layers):
        raise UsageError(
            f"the teacher has every {teacher.no_rope_freq}th layer without positions (no_rope_freq), counted from the "
            "first: with fewer layers others would lose theirs; prune its width, and leave --num-layers and "
            "--prune-layers out"
        )
    sizes["num_query_groups"] = _groups(sizes, teacher)
    for name in SIZES:
        value, most = sizes[name], getattr(teacher, name)
        if value is not None and value > most:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: the teacher has {most}; a student that is cut out of it has at "
                "most as much"
            )
    wanted = {name: getattr(teacher, name) if value is None else value for name, value in sizes.items()}
    heads, groups = wanted["num_attention_heads"], wanted["num_query_groups"]
    if heads % groups:
        raise UsageError(
            f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}: every key/value head "
            f"serves as many query heads ({groups * max(1, heads // groups)} would fit)"
        )
    most = teacher.num_attention_heads // teacher.num_query_groups
    if heads // groups > most:
        raise UsageError(
            f"--num-attention-heads {heads} over --num-query-groups {groups} is {heads // groups} query heads for each "
            f"key/value head, the teacher has {most}: no more can be cut out; --num-attention-heads {groups * most} "
            "is the most"
        )
    return dataclasses.replace(teacher, **wanted, moe_ffn_hidden_size=wanted["ffn_hidden_size"])


def _groups(sizes: dict[str, int | None], teacher: ModelShape) -> int | None:
    """Key/value heads, where only query heads are asked for: as many as those, if each of them has its own."""
    heads = sizes["num_attention_heads"]
    alone = teacher.num_query_groups == teacher.num_attention_heads
    return heads if sizes["num_query_groups"] is None and alone else sizes["num_query_groups"]


def _check_layers(numbers: list[int], num_layers: int) -> None:
    strangers = [number for number in numbers if not 0 <= number < num_layers]
    if strangers:
        raise UsageError(f"--prune-layers {strangers[0]}: the teacher's layers are 0 to {num_layers - 1}")
    if len(numbers) == num_layers:
        raise UsageError(f"--prune-layers names all {num_layers} layers of the teacher; at least one must stay")
