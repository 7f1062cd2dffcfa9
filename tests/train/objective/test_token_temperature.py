"""A temperature for each token: against whole logits, split over two processes, in a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import make_tree, one_step, run_training, write_dataset
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.head import KDTerm, VocabShard
from megakd.targets import DenseTargets, SparseTargets
from megakd.train.objective.objective import Objective
from megakd.train.objective.token_temperature import TokenTemperature

T, H, V, PADDING = 13, 24, 251, 5
SHARD = VocabShard(0, V + PADDING, V, None)


def make_targets() -> DenseTargets:
    torch.manual_seed(0)
    scale_T1 = torch.linspace(0.05, 3.0, T, dtype=torch.float64)[:, None]
    weight_vH = torch.randn(V + PADDING, H, dtype=torch.float64) + 0.5  # rows with a mean of their own
    return DenseTargets(torch.randn(T, H, dtype=torch.float64) * scale_T1, weight_vH)


def twin(mode: str, targets: DenseTargets, c: float, uncertain: float) -> torch.Tensor:
    found = []
    for hidden_H in targets.hidden_TH:
        logits_V = (targets.weight_vH @ hidden_H)[:V]
        p_V = logits_V.softmax(0)
        share = float(-(p_V * p_V.log()).sum()) / math.log(V)
        found.append(
            c * float(logits_V.std(correction=0)) if mode == "logit_std" else c * (1 - share) + uncertain * share
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["logit_std", "entropy"])
def test_temperatures_equal_whole_logits(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakd.train.objective.token_temperature._ROWS", 100)
    targets = make_targets()
    made = TokenTemperature(mode, uncertain=0.4, shard=SHARD, chunk_bytes=1 << 14)(targets, 1.7)
    expected_T = twin(mode, targets, 1.7, 0.4)
    torch.testing.assert_close(made.temperature_T, expected_T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.targets.hidden_TH * expected_T[:, None], targets.hidden_TH, rtol=1e-9, atol=1e-9)
    assert made.temperature_T.max() / made.temperature_T.min() > 1.5, "all tokens alike would show nothing"


def test_the_loss_is_that_of_tempered_logits() -> None:
    targets = make_targets()
    hidden_SBH = torch.randn(T, 1, H, dtype=torch.float64, requires_grad=True)
    weight_vH = torch.randn(V + PADDING, H, dtype=torch.float64)
    labels_SB, mask_SB = torch.randint(0, V, (T, 1)), torch.ones(T, 1, dtype=torch.bool)
    tempered = TokenTemperature("entropy", uncertain=0.4, shard=SHARD, chunk_bytes=1 << 14)
    term = KDTerm("reverse_kl", temperature=1.7, temperature_on="teacher")
    objective = Objective(0.5, term, SHARD, False, token_temperature=tempered)
    found = objective(hidden_SBH, weight_vH, labels_SB, mask_SB, targets)
    found.loss.backward()
    gradient = hidden_SBH.grad
    hidden_SBH.grad = None
    log_q = (hidden_SBH.flatten(0, 1) @ weight_vH.t())[:, :V].log_softmax(-1)
    tau_T1 = twin("entropy", targets, 1.7, 0.4)[:, None]
    log_p = ((targets.hidden_TH @ targets.weight_vH.t())[:, :V] / tau_T1).log_softmax(-1)
    loss = 0.5 * (log_q.exp() * (log_q - log_p)).sum() - 0.5 * log_q.gather(1, labels_SB).sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, hidden_SBH.grad, rtol=1e-9, atol=1e-12)
    assert found.temperature_T is not None
    torch.testing.assert_close(found.temperature_T, tau_T1.flatten(), rtol=1e-9, atol=0)


def test_extremes() -> None:
    """A teacher of one logit for all, one that is not finite; sparse targets are refused."""
    targets = make_targets()
    targets.hidden_TH[0], targets.hidden_TH[1] = 0.0, torch.nan
    made = TokenTemperature("logit_std", uncertain=1.0, shard=SHARD, chunk_bytes=1 << 14)(targets, 1.0)
    assert made.temperature_T[0] == 1e-3 and made.temperature_T[1].isnan() and made.temperature_T[2:].isfinite().all()
    ids_TK = torch.zeros(T, 1, dtype=torch.int64)
    with pytest.raises(UsageError, match="--kd-temperature-mode logit_std needs every logit"):
        TokenTemperature("logit_std", uncertain=1.0, shard=SHARD, chunk_bytes=1)(SparseTargets(ids_TK, ids_TK), 1.0)


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("temperature")
    data, teacher = write_dataset(folder / "data"), str(folder / "teacher")
    tree = make_tree(data, training={"train_iters": 20}, checkpoint={"save": teacher}, optim={"lr": 1e-2})
    assert world(1).run(run_training, tree) == [0]
    return {"data": data, "teacher": teacher}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["logit_std", "entropy"])
def test_a_step_equals_one_process(mode: str, setting: dict[str, Any], world: Worlds) -> None:
    told = {"kd_temperature_mode": mode, "kd_temperature_on": "teacher", "kd_temperature": 2.0}
    tree = make_tree(setting["data"], teacher={"load": setting["teacher"]}, objective=told)
    static = make_tree(
        setting["data"],
        teacher={"load": setting["teacher"]},
        objective={"kd_temperature_on": "teacher", "kd_temperature": 2.0},
    )
    whole = world(1).run(one_step, tree)[0]
    assert abs(whole["kd"] - world(1).run(one_step, static)[0]["kd"]) > 1e-3
    for parallel in ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}):
        for result in world(2).run(one_step, {**tree, "parallel": parallel}):
            for key in ("loss", "lm", "kd", "entropy", "grad_norm"):
                assert result[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), (parallel, key)
