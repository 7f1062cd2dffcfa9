"""Training from a logits store: the same losses as with the model that filled it, in any layout, order and blend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captured import GHOST, LAYOUTS, SOME, STORES, capture, make_stores, stored
from marks import slow
from runs import build_parts, losses, make_config, make_tree, one_step, output_of_training, run_training, weights
from worlds import Worlds

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.data.selection import Selection, SelectionWriter
from megakd.train.preflight import check_run


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_stores(world, tmp_path_factory.mktemp("stores"), STORES)


@pytest.mark.parametrize("tail", [slow("none"), "ghost", slow("renormalise")])
def test_every_id_stored_equals_the_model(tail: str, setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    """Whole training steps of KD alone: the gradients of one make the losses of the next."""
    alone: dict[str, Any] = {"kd_alpha": 1.0}
    online, offline = (
        make_tree(setting["data"], teacher=teacher, objective=objective, checkpoint={"save": str(tmp_path / name)})
        for name, teacher, objective in (
            ("on", {"load": setting["teacher"]}, alone),
            ("off", {"logits_load_dir": [setting["whole"]]}, {**alone, "kd_tail": tail}),
        )
    )
    assert world(1).run(run_training, online) == world(1).run(run_training, offline) == [0]
    expected, found = records(tmp_path / "on"), records(tmp_path / "off")
    assert len(found) == len(expected) == 4
    for one, other in zip(expected, found):
        for key in ("loss", "kd_loss", "grad_norm", "lm_loss"):
            assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-7), key
        assert other["teacher_entropy"] == pytest.approx(one["teacher_entropy"], abs=1 / 4096)  # as it is stored
        assert other["agreement"] == pytest.approx(one["agreement"], abs=2e-3) and other["stored_share"] == 1.0


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "loss" in record]


@pytest.mark.parametrize("name", ["tp2", *(slow(name) for name in LAYOUTS if name != "tp2")])
def test_layouts_agree(name: str, setting: dict[str, str], world: Worlds) -> None:
    size, parallel = LAYOUTS[name]
    whole = world(1).run(one_step, stored(setting, "sparse", objective=GHOST))[0]
    for result in world(size).run(one_step, stored(setting, "sparse", objective=GHOST, parallel=parallel)):
        for key in ("loss", "lm", "kd", "grad_norm", "entropy"):
            assert result[key] == pytest.approx(whole[key], rel=1e-5), key
        assert result["tokens"] == whole["tokens"] and result["agreement"] == whole["agreement"]


def sample_losses(tree: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """KD loss and LM loss of every sample of the first step, by its tokens; before any update."""
    from megakd.parallel import init_parallel
    from megakd.train.step import to_device

    config = make_config(tree)
    plan = check_run(config, 1)
    groups = init_parallel(config.parallel, seed=config.training.seed)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    batch = next(batches)
    found = {}
    for microbatch, targets in zip(batch, teacher.targets(batch)):
        (chunk,) = student.wrapped
        hidden_SBH = chunk(to_device(microbatch.tokens_BS, groups), None, None)
        labels_SB, mask_SB = (to_device(array, groups).t() for array in (microbatch.labels_BS, microbatch.loss_mask_BS))
        told = objective(hidden_SBH, student.output_weight(chunk), labels_SB, mask_SB, targets)  # type: ignore[arg-type]
        assert told.kd is not None
        sums = zip(told.kd.value_T.view(labels_SB.shape).sum(0), told.head.lm_T.view(labels_SB.shape).sum(0))
        for tokens, label, (kd, lm) in zip(microbatch.tokens_BS, microbatch.labels_BS[:, -1], sums):
            found[f"{tokens} {label}"] = (float(kd), float(lm))
    return found


def select(data: str, folder: Path, ids: list[int]) -> str:
    samples = ConcatSamples(IndexedDataset(data), 16)
    with SelectionWriter(folder) as writer:
        writer.append(np.array(sorted(ids)))
        writer.finish(
            packing="concat",
            seq_length=16,
            num_samples=samples.num_samples,
            dataset=samples.dataset.fingerprint,
            rule={},
        )
    return str(folder)


@pytest.mark.slow
def test_order_blend_and_selection_do_not_matter(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    """The loss of a sample does not depend on its place or on the samples beside it."""
    kept = sorted(np.random.default_rng(1).permutation(374)[:20].tolist())
    selection = select(setting["data"], tmp_path / "selection", kept)
    both: list[str | float] = [0.5, setting["other"], 0.5, setting["data"]]
    everything = {"global_batch_size": 370, "micro_batch_size": 37}
    reference = world(1).run(sample_losses, stored(setting, "whole", training=everything))[0]
    reference |= world(1).run(
        sample_losses, stored(setting, "whole_other", training=everything, data={"data_path": [setting["other"]]})
    )[0]
    small = {"global_batch_size": 20, "micro_batch_size": 5}
    variants = {
        "reshuffled": stored(setting, "whole", training=small, optim={}, data={}),
        "selected": stored(setting, "whole", training=small, data={"selection": [selection]}),
        "blended": stored(setting, "whole_other", "whole", training=small, data={"data_path": both}),
        "blend-selected": stored(
            setting, "whole_other", "whole", training=small, data={"data_path": both, "selection": ["all", selection]}
        ),
    }
    for name, tree in variants.items():
        found = world(1).run(sample_losses, tree)[0]
        known = [tokens for tokens in found if tokens in reference]
        assert len(known) >= len(found) - 2, name
        for tokens in known:
            assert found[tokens] == pytest.approx(reference[tokens], rel=1e-5), name


@pytest.mark.slow
def test_samples_without_targets_have_their_lm_loss_alone(setting: dict[str, str], world: Worlds) -> None:
    """Loss = sum of (1 - alpha) LM + alpha KD where there are targets, of LM where there are none."""
    plain = world(1).run(one_step, make_tree(setting["data"]))[0]
    tree = stored(setting, "some", objective={"kd_alpha": 0.75})
    by_sample = world(1).run(sample_losses, stored(setting, "whole"))[0]
    some = world(1).run(sample_losses, tree)[0]
    assert by_sample.keys() == some.keys()
    told = [tokens for tokens in some if some[tokens][0] != 0]
    assert 0 < len(told) < 8
    for tokens in told:
        assert some[tokens] == pytest.approx(by_sample[tokens], rel=1e-6)
    expected = sum(lm if tokens not in told else 0.25 * lm + 0.75 * kd for tokens, (kd, lm) in some.items()) / (8 * 16)
    for size in (1, 2):
        found = world(size).run(one_step, tree)[0]
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["stored_share"] == pytest.approx(len(told) / 8) and found["lm"] == pytest.approx(plain["lm"])
        assert found["kd"] == pytest.approx(sum(some[tokens][0] for tokens in told) / (16 * len(told)), rel=1e-5)


@pytest.mark.slow
def test_lm_weight_of_zero_leaves_samples_without_targets_their_own(setting: dict[str, str], world: Worlds) -> None:
    some = world(1).run(sample_losses, stored(setting, "some"))[0]
    found = world(1).run(one_step, stored(setting, "some", objective={"kd_alpha": 1.0}))[0]
    expected = sum(kd or lm for kd, lm in some.values()) / (8 * 16)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "parallel", [{}, slow({"tensor_model_parallel_size": 2}), slow({"pipeline_model_parallel_size": 2})]
)
def test_a_store_and_a_model_share_the_tokens(parallel: dict[str, int], setting: dict[str, str], world: Worlds) -> None:
    """With whole rows a token's targets are the same from either, so any share of them equals the model alone."""
    teacher = {"load": setting["teacher"]}
    data = {"data_path": [0.5, setting["other"], 0.5, setting["data"]]}
    size = 2 if parallel else 1
    for share, stores, groups in (
        ("some of a dataset", ("some",), {}),
        ("one of two datasets", ("none", "whole"), {"data": data}),
        ("all", ("whole_other", "whole"), {"data": data}),
    ):
        more: dict[str, Any] = {"parallel": parallel, "training": {"micro_batch_size": 1}, **groups}
        model = world(size).run(one_step, make_tree(setting["data"], teacher=teacher, **more))[0]
        mixed = world(size).run(one_step, stored(setting, *stores, **{**more, "teacher": teacher}))[0]
        for key in ("loss", "lm", "kd", "grad_norm"):
            assert mixed[key] == pytest.approx(model[key], rel=2e-6), (share, key)
        assert mixed["entropy"] == pytest.approx(model["entropy"], abs=1 / 4096)
        assert mixed["stored_share"] == 1.0 if share == "all" else 0 < mixed["stored_share"] < 1
        # what throughput counts: a microbatch is one sample here, of a dataset that is stored whole or not at all
        told = 1.0 if share == "some of a dataset" else 1 - mixed["stored_share"]
        assert (model["modelled_share"], mixed["modelled_share"]) == (1.0, pytest.approx(told, abs=1e-3)), share


@pytest.mark.slow
def test_gates_on_stored_and_modelled_entropies(setting: dict[str, str], world: Worlds) -> None:
    """Much the same tokens are taken whether their entropies are stored, read from the model, or some of each: stored
    ones are rounded to 1/2048."""
    gate = {"kd_entropy_gate": 0.3}
    teacher = {"load": setting["teacher"]}
    model = world(1).run(one_step, make_tree(setting["data"], teacher=teacher, objective=gate))[0]
    offline = world(1).run(one_step, stored(setting, "whole", objective=gate))[0]
    mixed = world(1).run(one_step, stored(setting, "some", teacher=teacher, objective=gate))[0]
    for found in (offline, mixed):
        assert found["kd_share"] == model["kd_share"]
        for key in ("loss", "kd", "entropy", "grad_norm"):
            assert found[key] == pytest.approx(model[key], rel=2e-3), key
    partial = world(1).run(one_step, stored(setting, "some", objective=gate))[0]
    share = partial["kd_share"] / partial["stored_share"]
    assert share == pytest.approx(0.7, abs=0.03)
    both = {**gate, "rho_keep": 0.6}
    model = world(1).run(one_step, make_tree(setting["data"], teacher=teacher, objective=both))[0]
    mixed = world(1).run(one_step, stored(setting, "whole", teacher=teacher, objective=both))[0]
    assert mixed["tokens"] == model["tokens"] and mixed["loss"] == pytest.approx(model["loss"], rel=1e-4)


@pytest.mark.slow
def test_resume_changes_no_bit(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    def tree(name: str, **training: Any) -> dict[str, Any]:
        checkpoint = {"save": str(tmp_path / name), "save_interval": 3}
        return stored(setting, "some", training={"train_iters": 6, **training}, checkpoint=checkpoint)

    assert world(1).run(run_training, tree("whole")) == [0]
    assert world(1).run(run_training, tree("cut", exit_interval=3)) == [75]
    assert world(1).run(run_training, tree("cut")) == [0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 6
    cut, whole = (world(1).run(weights, str(tmp_path / name), 6)[0] for name in ("cut", "whole"))
    assert cut == whole
    parents = json.loads((tmp_path / "cut" / "iter_0000006" / "manifest.json").read_text())["parents"]
    assert parents["logits0"] == check_run(make_config(tree("cut")), 1).stores[0].fingerprint  # type: ignore[union-attr]


@pytest.mark.slow
def test_going_on_with_another_teacher_is_said(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    """The stores and the teacher of a checkpoint are in its manifest: a run that goes on with others says which."""

    def tree(*stores: str, steps: int = 4, **teacher: Any) -> dict[str, Any]:
        checkpoint = {"save": str(tmp_path / "run"), "save_interval": 2}
        training = {"train_iters": steps}
        return stored(setting, *stores, teacher=teacher, training=training, checkpoint=checkpoint)

    said = "goes on with other targets"
    assert said not in world(1).run(output_of_training, tree("some"))[0]
    assert said not in world(1).run(output_of_training, tree("some", steps=5))[0]
    plan = check_run(make_config(tree("whole", load=setting["teacher"])), 1)
    some, whole = (json.loads((Path(setting[name]) / "store.json").read_text()) for name in ("some", "whole"))
    assert some["checksum"] != whole["checksum"] and plan.stores[0] is not None and plan.teacher is not None
    before = check_run(make_config(tree("some")), 1).stores[0]
    assert before is not None
    assert plan.changed_teachers == [
        f"logits0: {before.fingerprint} there, {plan.stores[0].fingerprint} here",
        f"teacher: none there, {plan.teacher.fingerprint} here",
    ]
    printed = world(1).run(output_of_training, tree("whole", steps=6))[0]
    assert said in printed and plan.changed_teachers[0] in printed
    assert plan.parents["data0"] not in printed


@pytest.mark.slow
def test_evaluation_with_the_model_a_store_or_neither(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    groups: dict[str, Any] = {"data": {"valid_data_path": [setting["other"]]}, "training": {"train_iters": 1}}
    teachers: dict[str, dict[str, Any]] = {
        "neither": {},
        "model": {"load": setting["teacher"]},
        "store": {"valid_logits_load_dir": [setting["whole_other"]]},
    }
    valid = {}
    for name, teacher in teachers.items():
        tree = stored(setting, "whole", teacher=teacher, checkpoint={"save": str(tmp_path / name)}, **groups)
        assert world(1).run(run_training, tree) == [0]
        valid[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["valid"]
    assert "kd_loss" not in valid["neither"]
    assert valid["neither"]["lm_loss"] == pytest.approx(valid["model"]["lm_loss"], rel=1e-6)
    assert "total_loss" not in valid["neither"], "the objective has a KD term that nobody could evaluate"
    model = valid["model"]
    mixture = model["lm_weight"] * model["lm_loss"] + model["alpha"] * model["kd_loss"]
    assert model["total_loss"] == pytest.approx(mixture, rel=1e-6)
    assert valid["store"] == pytest.approx(valid["model"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["counts", "drawn"])
def test_samples_train(name: str, setting: dict[str, str], world: Worlds) -> None:
    """An estimate of the same loss: 30 draws a token, 128 tokens."""
    online = world(1).run(one_step, make_tree(setting["data"], teacher={"load": setting["teacher"]}))[0]
    found = world(1).run(one_step, stored(setting, name, objective={"kd_divergence": "soft_cross_entropy"}))[0]
    assert found["kd"] == pytest.approx(online["kd"] + online["entropy"], rel=0.05)


def forwards_of_the_model(tree: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """For each microbatch of the first step: does it hold a sample of dataset 0, and did the model run for it."""
    from megakd.parallel import init_parallel
    from megakd.teachers.mixed_teacher import MixedTeacher

    config = make_config(tree)
    plan = check_run(config, 1)
    groups = init_parallel(config.parallel, seed=1)
    _, teacher, _, batches = build_parts(config, plan, groups)
    batch = next(batches)
    assert isinstance(teacher, MixedTeacher)
    ran: list[bool] = []
    hidden = teacher.model._hidden
    teacher.model._hidden = lambda microbatch: ran.append(True) or hidden(microbatch)  # type: ignore[method-assign]
    wanted, found = [], []
    for microbatch, targets in zip(batch, teacher.targets(batch)):
        assert targets is not None
        wanted.append(bool((microbatch.dataset_ids_B == 0).any()))
        found.append(bool(ran))
        ran.clear()
    return wanted, found


def test_the_model_runs_only_for_what_is_not_stored(setting: dict[str, str], world: Worlds) -> None:
    groups: dict[str, Any] = {
        "teacher": {"load": setting["teacher"]},
        "data": {"data_path": [0.4, setting["other"], 0.6, setting["data"]]},
        "training": {"micro_batch_size": 2, "global_batch_size": 32},
    }
    ((wanted, found),) = world(1).run(forwards_of_the_model, stored(setting, "none", "whole", **groups))
    assert wanted == found and set(found) == {True, False}
    groups["objective"] = {"rho_keep": 0.5}
    ((_, found),) = world(1).run(forwards_of_the_model, stored(setting, "none", "whole", **groups))
    assert all(found)


@pytest.mark.slow
def test_the_model_rests_on_a_selection_that_is_stored_whole(
    setting: dict[str, str], world: Worlds, tmp_path: Path
) -> None:
    """A store of a selection, as 'megakd capture --selection' makes it, lacks nothing for a run on that selection."""
    selection, other = (select(setting["data"], tmp_path / name, ids) for name, ids in (("s", SOME), ("o", SOME[:99])))
    fingerprint = Selection(selection).fingerprint
    parents = {"dataset": IndexedDataset(setting["data"]).fingerprint, "model": "m", "selection": fingerprint}
    folder = str(tmp_path / "store")
    world(1).run(capture, setting["data"], setting["teacher"], folder, {"parents": parents}, SOME)
    for chosen, runs in ((selection, False), (other, True), ("all", True)):
        groups = {"teacher": {"load": setting["teacher"]}, "data": {"selection": [chosen]}}
        ((_, found),) = world(1).run(forwards_of_the_model, stored(setting, folder, **groups))
        assert set(found) == {runs}, chosen
