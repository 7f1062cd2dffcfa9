"""Choice of what stays: by importance, whole key/value heads together; sizes that cannot be cut are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megakd.errors import UsageError
from megakd.model.config import ModelConfig, ModelShape
from megakd.pipeline.prune.artefact import Importance
from megakd.pipeline.prune.choice import Choice, choose
from megakd.pipeline.prune.config import PruneConfig
from megakd.pipeline.prune.student import student_shape

LAYERS, HEADS, GROUPS, NEURONS, CHANNELS = 7, 12, 4, 13, 36


def shape(**changes: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": CHANNELS, "ffn_hidden_size": NEURONS, "num_attention_heads": HEADS,
        "num_query_groups": GROUPS, "kv_channels": 4,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes}).resolve("test")


def config(**flags: Any) -> PruneConfig:
    made = PruneConfig(**{"data_path": "d", "seq_length": 8, "load": "l", "save": "s", **flags})
    made.validate()
    return made


def importance(seed: int = 0, **arrays: Any) -> Importance:
    rng = np.random.default_rng(seed)
    random = {
        "layers_L": rng.random(LAYERS), "heads_LA": rng.random((LAYERS, HEADS)),
        "neurons_LF": rng.random((LAYERS, NEURONS)), "channels_H": rng.random(CHANNELS),
    }  # fmt: skip
    return Importance(**{**random, **arrays}, loss=1.0)


def chosen(measured: Importance, *, prune_layers: list[int] | None = None, layer_choice: Any = "influence",
           **sizes: int) -> Choice:  # fmt: skip
    student = student_shape(config(prune_layers=prune_layers, **sizes), shape())
    return choose(measured, shape(), student, layer_choice=layer_choice, prune_layers=prune_layers)


def test_full_size_keeps_everything_in_order() -> None:
    choice = chosen(importance())
    assert choice.layers_L.tolist() == list(range(LAYERS)) and choice.channels_H.tolist() == list(range(CHANNELS))
    assert (choice.heads_LA == np.arange(HEADS)).all() and (choice.neurons_LF == np.arange(NEURONS)).all()
    assert (choice.groups_LG == np.arange(GROUPS)).all()


def test_the_most_important_stay() -> None:
    measured = importance(1)
    choice = chosen(measured, num_layers=4, hidden_size=10, ffn_hidden_size=5)
    assert choice.layers_L.tolist() == sorted(sorted(range(LAYERS), key=lambda i: -measured.layers_L[i])[:4])
    assert choice.channels_H.tolist() == sorted(sorted(range(CHANNELS), key=lambda i: -measured.channels_H[i])[:10])
    for place, layer in enumerate(choice.layers_L.tolist()):
        ranked = sorted(range(NEURONS), key=lambda i: -measured.neurons_LF[layer, i])
        assert choice.neurons_LF[place].tolist() == sorted(ranked[:5])


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (4, 4), (6, 2), (4, 2), (3, 1), (1, 1), (12, 4)])
def test_whole_groups_stay_together(heads: int, groups: int) -> None:
    measured = importance(2)
    choice = chosen(measured, num_attention_heads=heads, num_query_groups=groups)
    each = HEADS // GROUPS
    for layer in range(LAYERS):
        values = measured.heads_LA[layer].reshape(GROUPS, each)
        kept = sorted(sorted(range(GROUPS), key=lambda g: -values[g].sum())[:groups])
        expected = []
        for group in kept:
            best = sorted(range(each), key=lambda i: -values[group][i])[: heads // groups]
            expected += [group * each + i for i in sorted(best)]
        assert choice.groups_LG[layer].tolist() == kept and choice.heads_LA[layer].tolist() == expected


def test_even_layers_keep_the_ends() -> None:
    assert chosen(importance(), num_layers=4, layer_choice="even").layers_L.tolist() == [0, 2, 4, 6]
    assert chosen(importance(), num_layers=3, layer_choice="even").layers_L.tolist() == [0, 3, 6]
    assert chosen(importance(), num_layers=1, layer_choice="even").layers_L.tolist() == [0]
    assert len(set(chosen(importance(), num_layers=6, layer_choice="even").layers_L.tolist())) == 6


def test_named_layers_go() -> None:
    assert chosen(importance(), prune_layers=[5, 0]).layers_L.tolist() == [1, 2, 3, 4, 6]


def test_of_equal_parts_the_first_stay() -> None:
    assert chosen(importance(layers_L=np.ones(LAYERS)), num_layers=3).layers_L.tolist() == [0, 1, 2]


def test_the_student_is_the_teacher_in_smaller() -> None:
    student = student_shape(config(hidden_size=20, ffn_hidden_size=6, num_attention_heads=8), shape(rotary_base=5e5))
    assert (student.hidden_size, student.ffn_hidden_size, student.num_attention_heads) == (20, 6, 8)
    assert (student.num_query_groups, student.kv_channels, student.num_layers) == (GROUPS, 4, LAYERS)
    assert student.rotary_base == 5e5
    alone = student_shape(config(num_attention_heads=5), shape(num_query_groups=HEADS))
    assert alone.num_query_groups == 5, "where each head has its own keys, they go with it"
    named = student_shape(config(preset="miniplm-104m", num_layers=2), shape(
        num_layers=9, hidden_size=600, ffn_hidden_size=1500, num_attention_heads=12, num_query_groups=12, kv_channels=64
    ))  # fmt: skip
    assert (named.num_layers, named.hidden_size, named.num_attention_heads, named.num_query_groups) == (2, 512, 8, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_layers": 8}, "--num-layers 8: the teacher has 7"),
        ({"hidden_size": 37}, "--hidden-size 37: the teacher has 36"),
        ({"ffn_hidden_size": 14}, "--ffn-hidden-size 14: the teacher has 13"),
        ({"num_attention_heads": 6}, r"--num-attention-heads 6 is not a multiple of --num-query-groups 4.*\(4 would"),
        ({"num_query_groups": 5}, "--num-query-groups 5: the teacher has 4"),
        ({"num_query_groups": 2}, "is 6 query heads for each key/value head, the teacher has 3.* 6 is the most"),
        ({"num_layers": 0}, "--num-layers is 0; expected at least 1"),
        ({"prune_layers": [7]}, "--prune-layers 7: the teacher's layers are 0 to 6"),
        ({"prune_layers": list(range(7))}, "names all 7 layers"),
        ({"prune_layers": [1, 1]}, "--prune-layers 1 1: a number is there twice"),
        ({"prune_layers": [1], "num_layers": 3}, "--prune-layers and --num-layers: one"),
        ({"preset": "pd-1.9b"}, "the teacher has 7"),
        ({"preset": "nonsense"}, "--preset is 'nonsense'"),
        ({"transformer_impl": "transformer_engine"}, "local layers"),
        ({"calibration_samples": 0}, "--calibration-samples is 0"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        student_shape(config(**flags), shape())


def test_layers_without_positions_keep_their_places() -> None:
    teacher = shape(num_layers=8, no_rope_freq=4)
    with pytest.raises(UsageError, match="every 4th layer without positions"):
        student_shape(config(num_layers=6), teacher)
    with pytest.raises(UsageError, match="every 4th layer without positions"):
        student_shape(config(prune_layers=[2]), teacher)
    assert student_shape(config(num_layers=8, ffn_hidden_size=5), teacher).ffn_hidden_size == 5


def test_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="has 4 experts a layer: experts are not pruned"):
        student_shape(config(num_layers=2), shape(num_experts=4))
