"""Every option with every hostile value: refused with one of the documented errors, or a plan that can be built."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import pytest
from runs import make_tree, one_step, write_dataset
from worlds import Worlds

from megakd.config.tree import from_dict, list_leaves, validate
from megakd.errors import CorruptError, MismatchError, NoSpaceError, UsageError
from megakd.train.config import TrainConfig
from megakd.train.preflight import check_run

DOCUMENTED = (UsageError, MismatchError, CorruptError, NoSpaceError, OSError)  # each is one line on the console
HOSTILE: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [-(2**63), -1, 0, 1, 3, 7, 2**31, 2**63 - 1, 2**64],
    float: [-1.0, -1e-300, 0.0, 1e-320, 0.5, 1.0, 1.5, 1e300, float("inf"), float("nan")],
    str: ["", "x", "/", "..", "\udcff", "a\0b", "é" * 300],
}
BASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # and the groups of options tried in it
    "dense": ({}, ("",)),
    "experts": ({"student": {"num_experts": 4}}, ("student.num", "student.moe", "student.recompute", "parallel")),
    "samples": (
        {"training": {"train_samples": 32}, "data": {"split": "8,1,1"}, "optim": {"lr_decay_style": "WSD"}},
        ("training", "optim", "data.split", "data.packing"),
    ),
}


def hostile(hint: Any) -> list[Any]:
    """Values of every type of a hint, and of none of them."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    found: list[Any] = [None, {"a": 1}]
    for each in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(each) is typing.Literal:
            found += [*typing.get_args(each), "none of them"]
        elif typing.get_origin(each) is list:
            inner = hostile(typing.get_args(each)[0])
            found += [[], *([value] for value in inner[:6]), [1, 1, 1], [4, 2, 10], [2, 3], ["a"] * 3]
        elif each is not type(None):
            found += HOSTILE[each]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_no_value_ends_in_anything_but_a_documented_error(base: str, tmp_path: Path) -> None:
    data, tried, accepted = write_dataset(tmp_path / "data", num_tokens=1000), 0, 0
    groups, keys = BASES[base]
    for leaf in list_leaves(TrainConfig):
        group, _, name = leaf.key.partition(".")
        if not leaf.key.startswith(keys):
            continue
        for value in hostile(leaf.hint):
            tree = make_tree(data, **groups)
            tree.setdefault(group, {})[name] = value
            tried += 1
            try:
                config = from_dict(TrainConfig, tree)
                validate(config)
                config.resolved().kd_schedule()
                check_run(config.resolved(), 1)
                accepted += 1
            except DOCUMENTED as error:
                assert "\n" not in str(error) and "Traceback" not in str(error), (leaf.key, value)
            except Exception as error:
                raise AssertionError(f"{leaf.key}: {value!r} ends in {type(error).__name__}: {error}") from error
    assert tried > 100 and accepted > tried / 20


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more experts a token than there are": (
        {"student": {"num_experts": 4, "moe_router_topk": 8}},
        "--moe-router-topk 8: a token cannot go to more than the 4 experts",
    ),
    "one expert a token": ({"student": {"num_experts": 4, "moe_router_topk": 1}}, "--moe-router-topk is 1"),
    "full recompute alone": (
        {"student": {"recompute_granularity": "full"}},
        "--recompute-granularity full needs --recompute-method uniform or block and --recompute-num-layers N",
    ),
    "recompute method alone": ({"student": {"recompute_method": "block"}}, "without --recompute-granularity full"),
    "recompute more layers than there are": (
        {"student": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 5}},
        "--recompute-num-layers 5 of the 4 layers",
    ),
    "recompute in groups that do not fit": (
        {"student": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}},
        "--recompute-num-layers 3 of the 4 layers .* a divisor",
    ),
    "odd heads": ({"student": {"kv_channels": 7}}, "--kv-channels 7 .* rotates 7 numbers; expected an even number"),
    "odd heads by default": ({"student": {"hidden_size": 36, "num_attention_heads": 4}}, "--kv-channels 9"),
    "nothing rotated": ({"student": {"rotary_percent": 0.1}}, "rotates 0 numbers"),
    "no heads": ({"student": {"num_attention_heads": 0}}, "expected positive sizes"),
    "heads and groups": ({"student": {"num_query_groups": 3}}, "is not a multiple of --num-query-groups 3"),
    "shared expert without experts": (
        {"student": {"moe_shared_expert_intermediate_size": 8}},
        "--moe-shared-expert-intermediate-size 8 without experts",
    ),
    "rope base": ({"student": {"rotary_base": 0.5}}, "--rotary-base is 0.5; expected at least 1"),
    "layers beyond reason": ({"student": {"num_layers": 2**62}}, "--num-layers is .*; expected at most"),
    "vocabulary of none": ({"data": {"vocab_size": 0}}, "--vocab-size is 0"),
    "negative seed": ({"training": {"seed": -1}}, "--seed is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be(name: str, tmp_path: Path) -> None:
    groups, message = REFUSED[name]
    tree = make_tree(write_dataset(tmp_path / "data"), **groups)
    with pytest.raises(UsageError, match=message):
        config = from_dict(TrainConfig, tree)
        validate(config)
        check_run(config, 1)


@pytest.mark.slow
def test_corners_that_are_accepted_take_a_step(world: Worlds, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    for student in (
        {"kv_channels": 2, "num_layers": 1, "num_query_groups": 1, "ffn_hidden_size": 1},
        {"num_experts": 2, "rotary_percent": 0.25, "norm_epsilon": 1e-320},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
    ):
        found = world(1).run(one_step, make_tree(data, student=student))[0]
        assert found["loss"] > 0, student
