"""What cannot work is refused before a process group exists, with the value, the expectation and the right status."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import TOKENIZER, make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.__main__ import run
from megakd.data.indexed.writer import IndexedWriter
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.losses.terms import KDTerm, legality_table
from megakd.model.checkpoint.tensor_names import read_tensor_names
from megakd.model.config import ModelConfig
from megakd.train import main as train_main
from megakd.train.objective.config import ObjectiveConfig
from megakd.train.preflight import check_run
from megakd.train.record.metrics import _lock


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refusals")
    data = write_dataset(folder / "data")
    other = write_dataset(folder / "other", tokenizer={**TOKENIZER, "hash": "1" * 32})
    teacher = folder / "teacher"
    tree = make_tree(data, training={"train_iters": 1}, checkpoint={"save": str(teacher)})
    assert world(1).run(run_training, tree) == [0]
    return {"data": data, "other": other, "teacher": str(teacher), "folder": folder}


REFUSED: dict[str, tuple[int, dict[str, Any], type[ValueError], str]] = {
    "world size": (
        3,
        {"parallel": {"tensor_model_parallel_size": 2}},
        UsageError,
        "world size 3 is not a multiple of TP x PP",
    ),
    "context parallel world": (2, {"parallel": {"context_parallel_size": 4}}, UsageError, "TP x PP x CP = 1 x 1 x 4"),
    "tp and heads": (
        3,
        {"parallel": {"tensor_model_parallel_size": 3}},
        UsageError,
        "--num-attention-heads 4 is not a mult",
    ),
    "tp and groups": (
        4,
        {"parallel": {"tensor_model_parallel_size": 4}, "student": {"num_query_groups": 2}},
        UsageError,
        "--num-query-groups 2",
    ),
    "pp and layers": (
        3,
        {"parallel": {"pipeline_model_parallel_size": 3}},
        UsageError,
        "--num-layers 4 is not a multiple of",
    ),
    "batch": (2, {"training": {"global_batch_size": 6}}, UsageError, "--global-batch-size 6 is not a multiple"),
    "vpp without pp": (
        1,
        {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
        UsageError,
        "pipeline-model-parallel-size >= 2",
    ),
    "interleaved pp2 with batched messages": (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "overlap_p2p_comm": False,
            }
        },
        UsageError,
        "batched messages give wrong losses",
    ),
    "freed outputs still being sent": (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "overlap_p2p_comm": True,
                "deallocate_pipeline_outputs": True,
            }
        },
        UsageError,
        "deallocate-pipeline-outputs",
    ),
    "interleaved microbatches": (
        2,
        {
            "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "training": {"micro_batch_size": 8},
        },
        UsageError,
        "needs a multiple of --pipeline-model-parallel-size",
    ),
    "sp without tp": (1, {"parallel": {"sequence_parallel": True}}, UsageError, "--sequence-parallel needs"),
    "experts without ep": (
        2,
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "student": {"num_experts": 4}},
        UsageError,
        "train wrong",
    ),
    "fp8 on local layers": (
        1,
        {"student": {"fp8_format": "hybrid", "transformer_impl": "local"}},
        UsageError,
        "ignore it",
    ),
    "small vocabulary": (1, {"data": {"vocab_size": 100}}, UsageError, "token id 250, the vocabulary has 100"),
    "no data": (1, {"data": {"data_path": ["/nowhere/data"]}}, UsageError, "/nowhere/data"),
    "alpha": (1, {"objective": {"kd_alpha": 1.5}}, UsageError, "--kd-alpha is 1.5"),
    "temperature": (1, {"objective": {"kd_temperature": 0.0}}, UsageError, "--kd-temperature is 0.0"),
    "divergence": (
        1,
        {"objective": {"kd_divergence": "js"}},
        UsageError,
        "--kd-divergence 'js' is not one of forward_kl",
    ),
    "gate without a teacher": (1, {"objective": {"kd_entropy_gate": 0.2}}, UsageError, "--kd-entropy-gate 0.2 asks a"),
    "rho without a teacher": (1, {"objective": {"rho_keep": 0.6}}, UsageError, "--rho-keep 0.6 asks a teacher"),
    "tail of a model": (
        1,
        {"teacher": {"load": "x"}, "objective": {"kd_tail": "ghost"}},
        UsageError,
        "--kd-tail ghost is for sparse targets",
    ),
    "teacher for nothing": (
        1,
        {"teacher": {"load": "x"}, "objective": {"kd_alpha": 0.0}},
        UsageError,
        "it would run and change nothing",
    ),
    "gate on no KD": (
        1,
        {"teacher": {"load": "x"}, "objective": {"kd_alpha": 0.0, "rho_keep": 0.5, "kd_entropy_gate": 0.2}},
        UsageError,
        "no token gets KD",
    ),
    "warm-up": (1, {"optim": {"lr_warmup_iters": 9}}, UsageError, "--lr-warmup-iters 9"),
    "teacher missing": (1, {"teacher": {"load": "/nowhere/teacher"}}, UsageError, "teacher: folder /nowhere/teacher"),
    "checkpoint missing": (1, {"checkpoint": {"load": "/nowhere/run"}}, UsageError, "--load: folder /nowhere/run"),
    "preset": (1, {"student": {"preset": "miniplm-9b"}}, UsageError, "miniplm-104m"),
    "sequence and cp": (
        4,
        {"parallel": {"context_parallel_size": 4}, "data": {"seq_length": 12}},
        UsageError,
        "multiple of 2 x",
    ),
}


VALUES = {
    "optim": {"adam_beta1": 2.0, "adam_beta2": -1.0, "adam_eps": -1.0, "clip_grad": -1.0, "lr_wsd_decay_iters": -5},
    "student": {
        "norm_epsilon": -1.0,
        "rotary_base": 0.0,
        "rotary_percent": 5.0,
        "num_query_groups": 0,
        "ffn_hidden_size": -64,
        "make_vocab_size_divisible_by": 0,
    },
    "parallel": {"expert_tensor_parallel_size": 0, "distributed_timeout_minutes": 1e18},
    "training": {"train_iters": 2**63, "global_batch_size": 2**40, "exit_interval": 0},
    "checkpoint": {"save_interval": -1},
    "teacher": {"tensor_model_parallel_size": -1},
    "objective": {
        "kd_temperature": 1e-300,
        "kd_reverse_weight": 1.1,
        "kd_jsd_beta": -0.1,
        "kd_skew_alpha": 1.0,
        "kd_akl_mu": 2.0,
        "kd_ab_alpha": 9.0,
        "kd_ab_beta": -9.0,
        "kd_dkd_alpha": -1.0,
        "kd_dkd_beta": -1.0,
        "taid_t_start": -0.1,
        "taid_t_end": 0.3,  # before its start
        "taid_alpha": 2.0,
        "taid_beta": 1.0,
        "kd_entropy_gate": 1.0,
        "rho_keep": 0.0,
        "z_loss_coeff": -1e-4,
    },
    "evaluate": {"eval_iters": 0, "eval_interval": -1},
}


@pytest.mark.parametrize(("group", "key"), [(group, key) for group, values in VALUES.items() for key in values])
def test_values_out_of_range(group: str, key: str, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=key.replace("_", "[-_]")):
        make_config(make_tree(setting["data"], **{group: {key: VALUES[group][key]}}))


@pytest.mark.parametrize("minutes", [-3.0, 0.0, 0.009, 525_601.0, 1e9])
def test_timeouts_are_from_a_moment_to_a_year(minutes: float, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--distributed-timeout-minutes is .*; expected 0.01 to 525600, a year"):
        make_config(make_tree(setting["data"], parallel={"distributed_timeout_minutes": minutes}))


def test_a_run_that_never_ends_tells_no_impossible_time(setting: dict[str, Any], world: Worlds) -> None:
    tree = make_tree(setting["data"], training={"train_iters": 10**15, "exit_interval": 1})
    assert world(1).run(run_training, tree) == [1]  # there is nowhere to save


def test_warm_up_that_fills_the_run(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--lr-warmup-iters 10"):
        make_config(make_tree(setting["data"], optim={"lr_decay_style": "constant", "lr_warmup_iters": 10}))


def test_resume_with_other_data_or_seed(setting: dict[str, Any]) -> None:
    tree = make_tree(setting["data"], checkpoint={"save": setting["teacher"]}, training={"seed": 6})
    with pytest.raises(MismatchError, match="--seed was 5, is now 6"):
        check_run(make_config(tree), 1)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    lock = _lock(tmp_path)
    with pytest.raises(UsageError, match=f'in use by another run; .*"pid": {os.getpid()}'):
        _lock(tmp_path)
    lock.__exit__()
    _lock(tmp_path).__exit__()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_starts(name: str, setting: dict[str, Any]) -> None:
    size, groups, error, message = REFUSED[name]
    with pytest.raises(error, match=message.replace("(", r"\(")):
        check_run(make_config(make_tree(setting["data"], **groups)), size)


def test_teacher_with_another_tokenizer(setting: dict[str, Any]) -> None:
    tree = make_tree(setting["other"], teacher={"load": setting["teacher"]})
    with pytest.raises(MismatchError, match="different tokenizers.*1111.*the teacher.*0000"):
        check_run(make_config(tree), 1)


def test_data_of_two_tokenizers(setting: dict[str, Any]) -> None:
    tree = make_tree(setting["data"], data={"valid_data_path": [setting["other"]]})
    with pytest.raises(MismatchError, match="different tokenizers"):
        check_run(make_config(tree), 1)


def damaged(setting: dict[str, Any], tmp_path: Path, damage: Callable[[Path], object]) -> dict[str, Any]:
    shutil.copytree(setting["teacher"], tmp_path / "teacher")
    damage(tmp_path / "teacher" / "iter_0000001")
    return make_tree(setting["data"], teacher={"load": str(tmp_path / "teacher")})


def test_teacher_with_a_missing_or_cut_file(setting: dict[str, Any], tmp_path: Path) -> None:
    tree = damaged(setting, tmp_path, lambda path: (path / "__0_0.distcp").unlink())
    with pytest.raises(CorruptError, match="__0_0.distcp"):
        check_run(make_config(tree), 1)
    shutil.rmtree(tmp_path / "teacher")
    tree = damaged(setting, tmp_path, lambda path: (path / ".metadata").write_bytes(b"x"))
    with pytest.raises(CorruptError, match="metadata"):
        check_run(make_config(tree), 1)


def test_teacher_with_missing_weights(setting: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    """A record that promises more than the checkpoint holds: nothing may be left as it was initialised."""

    def promise_more(path: Path) -> None:
        from megakd.artefacts.manifest import read_manifest, write_manifest

        old = read_manifest(path / "manifest.json")
        shape = {**old.parameters["shape"], "add_qkv_bias": True}
        write_manifest(
            path / "manifest.json",
            format=old.format,
            version=old.version,
            parameters={**old.parameters, "shape": shape},
            parents=old.parents,
            tokenizer=old.tokenizer,
            files=old.files,
        )

    tree = damaged(setting, tmp_path, promise_more)
    with pytest.raises(MismatchError, match="linear_qkv.bias is missing"):
        check_run(make_config(tree), 1)


def test_held_out_data_whose_bytes_are_damaged(setting: dict[str, Any], tmp_path: Path) -> None:
    """Before a step is made: bits per byte would be wrong."""
    with IndexedWriter(tmp_path / "held", np.uint16) as writer:
        writer.add_documents(np.arange(200), np.array([150, 50], np.int32), np.array([400, 100]))
        writer.finish(tokenizer=TOKENIZER)
    tree = make_tree(setting["data"], data={"valid_data_path": [str(tmp_path / "held")]})
    assert check_run(make_config(tree), 1).valid_blend is not None
    (tmp_path / "held.bytes").write_bytes(np.array([401, 99], "<i8").tobytes())
    with pytest.raises(CorruptError, match=r"held\.bytes: block 0"):
        check_run(make_config(tree), 1)


def test_resume_with_another_model(setting: dict[str, Any]) -> None:
    tree = make_tree(setting["data"], checkpoint={"save": setting["teacher"]}, student={"num_layers": 2})
    with pytest.raises(MismatchError, match="num_layers: 4 there, 2 here"):
        check_run(make_config(tree), 1)


def test_transformer_engine_is_not_here(setting: dict[str, Any], world: Worlds) -> None:
    for student in ({"transformer_impl": "transformer_engine"}, {"fp8_format": "hybrid"}):
        with pytest.raises(Exception, match="needs Transformer Engine.*no CUDA device.*pip install"):
            world(1).run(run_training, make_tree(setting["data"], student=student))


def test_exit_statuses(setting: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status(**groups: Any) -> int:
        config = tmp_path / "c.yaml"
        config.write_text(yaml.safe_dump(make_tree(setting["data"], **groups)))
        return run(train_main.main, ["--config", str(config)])

    assert status(parallel={"tensor_model_parallel_size": 2}) == 2
    assert status(optim={"learning_rate": 1}) == 2
    assert "unknown configuration key 'optim.learning_rate'" in capsys.readouterr().err
    assert status(data={"data_path": [setting["other"]]}, teacher={"load": setting["teacher"]}) == 4
    tree = damaged(setting, tmp_path, lambda path: (path / "common.pt").write_bytes(b""))
    assert status(teacher=tree["teacher"]) == 5


def test_help_shows_what_goes_with_what(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            train_main.main([flag])
        shown = capsys.readouterr().out
        assert all(f"  {line}\n" in shown + "\n" for line in legality_table().splitlines())


def test_every_parameter_of_a_divergence_has_a_flag() -> None:
    told = {"jsd_beta": 0.25, "temperature": 3.0, "tail": "ghost", "dkd_beta": 2.0, "temperature_on": "teacher"}
    term = ObjectiveConfig(kd_divergence="decoupled", **{f"kd_{key}": value for key, value in told.items()}).kd_term()
    assert term == KDTerm("decoupled", **told)
    assert ObjectiveConfig().kd_term() == KDTerm()


def test_presets_have_the_published_sizes() -> None:
    """Parameters in millions with the papers' vocabularies (151,936 for MiniPLM; about 150K for PD)."""
    published = {"miniplm-104m": 104, "miniplm-200m": 203, "miniplm-500m": 464, "miniplm-1.2b": 1161}
    for name, millions in published.items():
        shape = ModelConfig(preset=name).resolve("student")
        embeddings = 151936 * shape.hidden_size * (1 if shape.tied else 2)
        count = shape.flops_per_token_forward / 2 + embeddings
        assert count / 1e6 == pytest.approx(millions, rel=0.01), name
    sizes = {"pd-330m": 330, "pd-670m": 670, "pd-1.9b": 1900, "pd-3.8b": 3800, "pd-6.8b": 6800}
    for name, millions in sizes.items():
        shape = ModelConfig(preset=name).resolve("student")
        count = shape.flops_per_token_forward / 2 + 151552 * shape.hidden_size * (1 if shape.tied else 2)
        assert count / 1e6 == pytest.approx(millions, rel=0.08), (name, count)


@pytest.mark.slow
@pytest.mark.parametrize("student", [{}, {"add_qkv_bias": True, "qk_layernorm": False}, {"num_experts": 4}])
@pytest.mark.parametrize("untied", [True, False])
def test_weight_names_are_those_of_a_checkpoint(
    student: dict[str, Any], untied: bool, setting: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    student = {**student, "untie_embeddings_and_output_weights": untied}
    tree = make_tree(
        setting["data"], student=student, training={"train_iters": 1}, checkpoint={"save": str(tmp_path / "run")}
    )
    assert world(1).run(run_training, tree) == [0]
    path = tmp_path / "run" / "iter_0000001"
    found = {name for name in read_tensor_names(path) if not name.startswith(("optimizer", "rng"))}
    found = {name for name in found if "_extra_state" not in name and "mlp." not in name.replace("mlp.linear", "")}
    expected = make_config(tree).student.resolve("student").weight_names()
    assert {name for name in expected if "mlp" not in name} == {name for name in found if "mlp" not in name}
    if "num_experts" not in student:
        assert expected == found


def test_records_are_plain_json(setting: dict[str, Any]) -> None:
    manifest = json.loads((Path(setting["teacher"]) / "iter_0000001" / "manifest.json").read_text())
    assert manifest["parameters"]["iteration"] == 1 and manifest["tokenizer"]["hash"] == "0" * 32
