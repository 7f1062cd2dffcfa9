"""What a token weighs: the objective against whole logits and autograd, gates against a sort, both in any layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from runs import build_parts, make_config, make_tree, one_step, run_training, write_dataset
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.head import KDTerm, VocabShard
from megakd.targets import DenseTargets, MixedTargets, SparseTargets
from megakd.train.objective.gates import Gates, apply_gates
from megakd.train.objective.objective import Objective
from megakd.train.objective.taid import Taid
from megakd.train.preflight import check_run
from megakd.train.step import _not_finite, _sums

S, B, V, HIDDEN = 13, 3, 251, 16
SHARD = VocabShard(0, V + 1, V, None)


class Inputs:
    """A microbatch of float64: hidden states and heads of student and teacher, labels, a mask."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.hidden_SBH = torch.randn(S, B, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.weight_vH = torch.randn(V + 1, HIDDEN, dtype=torch.float64, requires_grad=True)
        self.teacher = DenseTargets(
            torch.randn(S * B, 24, dtype=torch.float64), torch.randn(V + 1, 24, dtype=torch.float64) * 0.5
        )
        self.labels_SB = torch.randint(0, V, (S, B))
        self.mask_SB = torch.rand(S, B) > 0.2

    def log_probs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of student and teacher, ``[T, V]``, and the student's log-sum-exp."""
        student_TV = (self.hidden_SBH.flatten(0, 1) @ self.weight_vH.t())[:, :V]
        teacher_TV = (self.teacher.hidden_TH @ self.teacher.weight_vH.t())[:, :V]
        return student_TV.log_softmax(-1), teacher_TV.log_softmax(-1), student_TV.logsumexp(-1)


def chosen(scores_T: Tensor, among_T: Tensor, share: float, *, largest: bool) -> Tensor:
    """The slow twin of a gate: sort the tokens in ``among_T``, take the share."""
    tokens = sorted(among_T.nonzero().flatten().tolist(), key=lambda t: scores_T[t].item(), reverse=largest)
    taken_T = torch.zeros_like(among_T)
    taken_T[tokens[: round(share * len(tokens))]] = True
    return taken_T


def twin_gates(inputs: Inputs, gates: Gates) -> tuple[Tensor, Tensor]:
    log_q, log_p, _ = inputs.log_probs()
    kept_T, labels_T1 = inputs.mask_SB.flatten(), inputs.labels_SB.reshape(-1, 1)
    if gates.rho_keep < 1:
        excess_T = (log_p - log_q).gather(1, labels_T1).squeeze(1)
        kept_T = kept_T & ~chosen(excess_T, kept_T, 1 - gates.rho_keep, largest=False)
    entropy_T = -(log_p.exp() * log_p).sum(-1)
    return kept_T, kept_T & ~chosen(entropy_T, kept_T, gates.entropy_gate, largest=False)


GATES = [Gates(), Gates(rho_keep=0.6), Gates(entropy_gate=0.15), Gates(0.7, 0.3)]


@pytest.mark.parametrize("gates", GATES, ids=str)
def test_gates_equal_a_sort(gates: Gates) -> None:
    inputs = Inputs()
    found = apply_gates(
        gates,
        inputs.hidden_SBH.flatten(0, 1),
        inputs.weight_vH,
        inputs.labels_SB.flatten(),
        inputs.mask_SB.flatten(),
        inputs.teacher,
        shard=SHARD,
        chunk_bytes=1 << 14,
    )
    kept_T, kd_T = twin_gates(inputs, gates)
    assert torch.equal(found.kept_T, kept_T) and torch.equal(found.kd_T, kd_T)
    assert gates.closed == (not torch.equal(kd_T, inputs.mask_SB.flatten()))


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("z_loss_coeff", [0.0, 2.0**-7])
def test_objective_equals_whole_logits(gates: Gates, alpha: float, z_loss_coeff: float) -> None:
    """Weights are powers of two: they are fp32, and exact."""
    inputs = Inputs()
    objective = Objective(alpha, KDTerm() if alpha else None, SHARD, False, z_loss_coeff, gates, chunk_bytes=1 << 14)
    found = objective(inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, inputs.mask_SB, inputs.teacher)
    found.loss.backward()
    gradients = inputs.hidden_SBH.grad, inputs.weight_vH.grad

    inputs.hidden_SBH.grad = inputs.weight_vH.grad = None
    kept_T, kd_T = twin_gates(inputs, gates)
    log_q, log_p, log_z_T = inputs.log_probs()
    lm_T = -log_q.gather(1, inputs.labels_SB.reshape(-1, 1)).squeeze(1)
    kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = (1 - alpha) * lm_T[kept_T].sum() + alpha * kl_T[kd_T].sum() + z_loss_coeff * log_z_T[kept_T].square().sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=0)
    for one, other in zip(gradients, (inputs.hidden_SBH.grad, inputs.weight_vH.grad)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.head.lm_T[found.known_T], lm_T[found.known_T], rtol=1e-10, atol=0)
    assert torch.equal(found.known_T, kd_T if alpha == 1 and z_loss_coeff == 0 else kept_T)
    assert torch.equal(found.kept_T, kept_T) and (torch.equal(found.kd_T, kd_T) if alpha else not found.kd_T.any())


def stored_rows(inputs: Inputs, has_targets_T: Tensor) -> SparseTargets:
    """Every id of the tokens that have targets, in an order of their own; of the others nothing."""
    _, log_p, _ = inputs.log_probs()
    ids_TK = torch.rand(S * B, V).argsort(1)
    entropy_T = torch.where(has_targets_T, -(log_p.exp() * log_p).sum(-1), 0)
    log_probs_TK = torch.where(has_targets_T[:, None], log_p.gather(1, ids_TK), -torch.inf)
    return SparseTargets(ids_TK, log_probs_TK, "top_p_k", entropy_T, has_targets_T)


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_stored_and_modelled_targets_together_equal_the_model(gates: Gates, alpha: float) -> None:
    inputs = Inputs()
    mixed = MixedTargets(stored_rows(inputs, torch.rand(S * B) > 0.4), inputs.teacher)
    objective = Objective(alpha, KDTerm(tail="ghost"), SHARD, False, gates=gates, chunk_bytes=1 << 14)
    results, gradients = [], []
    for targets in (inputs.teacher, mixed):
        inputs.hidden_SBH.grad = inputs.weight_vH.grad = None
        found = objective(inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, inputs.mask_SB, targets)
        found.loss.backward()
        results.append(found)
        gradients.append((inputs.hidden_SBH.grad, inputs.weight_vH.grad))
    model, both = results
    assert torch.equal(both.kept_T, model.kept_T) and torch.equal(both.kd_T, model.kd_T)
    assert torch.equal(both.stored_T, mixed.stored.has_targets_T & inputs.mask_SB.flatten())
    torch.testing.assert_close(both.loss, model.loss, rtol=1e-7, atol=0)
    assert both.kd is not None and model.kd is not None
    for one, other in zip(vars(both.kd).values(), vars(model.kd).values()):
        torch.testing.assert_close(one[model.kd_T], other[model.kd_T], rtol=1e-6, atol=1e-9)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "dense", "stored"])
@pytest.mark.parametrize(("alpha", "lm_weight", "z"), [(0.25, None, 0.0), (1.0, None, 0.0), (1.0, 0.0, 0.5)])
@pytest.mark.parametrize("gates", [Gates(), Gates(entropy_gate=0.3)], ids=str)
def test_a_mask_that_is_known_to_be_whole_changes_no_bit(
    kind: str, alpha: float, lm_weight: float | None, z: float, gates: Gates
) -> None:
    inputs = Inputs()
    stored = stored_rows(inputs, torch.rand(S * B) > 0.4)
    targets = {"none": None, "dense": inputs.teacher, "stored": stored}[kind]
    objective = Objective(
        alpha, KDTerm(tail="ghost" if kind == "stored" else "none"), SHARD, False, z, gates, lm_weight=lm_weight
    )
    results = []
    for whole in (False, True):
        inputs.hidden_SBH.grad = inputs.weight_vH.grad = None
        mask_SB = torch.ones_like(inputs.mask_SB)
        found = objective(inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, mask_SB, targets, whole=whole)
        found.loss.backward()
        results.append((found.loss, found.head.lm_T, inputs.hidden_SBH.grad, inputs.weight_vH.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "generalised_jsd", "decoupled", "adaptive_kl"])
def test_a_whole_mask_asks_the_device_nothing(divergence: str) -> None:
    """Loss, gradient and the sums of the record on tensors that have no values, where every question about one fails.

    On a GPU such a question waits until the queue of the device is empty.
    """
    inputs = Inputs()
    hidden, weight, labels, teacher, head = (
        tensor.detach().to("meta")
        for tensor in (inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, *vars(inputs.teacher).values())
    )
    mask, targets = torch.ones(S, B, dtype=torch.bool, device="meta"), DenseTargets(teacher, head)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    objective = Objective(0.5, KDTerm(divergence), SHARD, False, 0.5, implementation="reference", chunk_bytes=1 << 14)
    found = objective(*leaves, labels, mask, targets, whole=True)
    assert _sums(found).is_meta and _not_finite(found, mask).shape == (B,)
    found.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        objective(*leaves, labels, mask, targets)


@pytest.mark.parametrize("gates", [Gates(), Gates(entropy_gate=0.3)], ids=str)
@pytest.mark.parametrize(("alpha", "lm_weight"), [(0.25, None), (1.0, None), (0.25, 0.5)])
def test_tokens_without_targets_weigh_their_lm_loss_in_full(
    gates: Gates, alpha: float, lm_weight: float | None
) -> None:
    """Gates rank the tokens that have targets, and no others."""
    inputs = Inputs()
    has_T, mask_T = torch.rand(S * B) > 0.4, inputs.mask_SB.flatten()
    targets = stored_rows(inputs, has_T)
    objective = Objective(alpha, KDTerm(tail="ghost"), SHARD, False, gates=gates, lm_weight=lm_weight)
    found = objective(inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, inputs.mask_SB, targets)
    found.loss.backward()
    gradients = inputs.hidden_SBH.grad, inputs.weight_vH.grad

    inputs.hidden_SBH.grad = inputs.weight_vH.grad = None
    assert targets.entropy_T is not None
    kd_T = mask_T & has_T
    kd_T = kd_T & ~chosen(targets.entropy_T, kd_T, gates.entropy_gate, largest=False)
    log_q, log_p, _ = inputs.log_probs()
    lm_T = -log_q.gather(1, inputs.labels_SB.reshape(-1, 1)).squeeze(1)
    kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)
    share = 1 - alpha if lm_weight is None else lm_weight
    loss = share * lm_T[mask_T & has_T].sum() + lm_T[mask_T & ~has_T].sum() + alpha * kl_T[kd_T].sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-7, atol=0)
    for one, other in zip(gradients, (inputs.hidden_SBH.grad, inputs.weight_vH.grad)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert torch.equal(found.kept_T, mask_T) and torch.equal(found.kd_T, kd_T)
    assert torch.equal(found.known_T, mask_T & (kd_T | ~has_T) if share == 0 else mask_T)


def test_evaluation_uses_all_tokens_and_the_teacher_itself() -> None:
    inputs = Inputs()
    taid = Taid(t_start=0.4, t_end=1.0, alpha=0.1, beta=0.9, train_iters=10)
    training = Objective(0.5, KDTerm("taid"), SHARD, False, gates=Gates(0.5, 0.5), taid=taid)
    plain = Objective(0.5, KDTerm(), SHARD, False)
    arguments = inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, inputs.mask_SB, inputs.teacher
    assert training.held_out()(*arguments).loss == plain(*arguments).loss
    assert training(*arguments).loss != plain(*arguments).loss


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gates_let_nan_through_and_never_look_behind_the_mask(side: str) -> None:
    """What is not a number must not be dropped in silence; at a masked token it is nobody's."""
    for masked in (True, False):
        clean, dirty = Inputs(), Inputs()
        token = int((dirty.mask_SB.flatten() != masked).nonzero()[0])
        hidden_TH = dirty.hidden_SBH.detach().flatten(0, 1) if side == "student" else dirty.teacher.hidden_TH
        hidden_TH[token] = torch.nan
        objective = Objective(0.5, KDTerm(), SHARD, False, 0.1, Gates(0.5, 0.5))
        results = [
            objective(inputs.hidden_SBH, inputs.weight_vH, inputs.labels_SB, inputs.mask_SB, inputs.teacher)
            for inputs in (clean, dirty)
        ]
        if masked:
            assert torch.equal(results[0].loss, results[1].loss)
        else:
            assert results[1].kept_T[token] and results[1].loss.isnan()


def test_gates_on_sparse_targets() -> None:
    inputs = Inputs()
    mask_T, entropy_T = inputs.mask_SB.flatten(), torch.rand(S * B)
    ids_TK = torch.arange(4).repeat(S * B, 1)
    sparse = SparseTargets(ids_TK, torch.full(ids_TK.shape, -2.0), entropy_T=entropy_T)
    rest: Any = (inputs.hidden_SBH.flatten(0, 1), inputs.weight_vH, inputs.labels_SB.flatten(), mask_T)
    found = apply_gates(Gates(entropy_gate=0.4), *rest, sparse, shard=SHARD, chunk_bytes=1 << 14)
    assert torch.equal(found.kept_T, mask_T)
    assert torch.equal(found.kd_T, mask_T & ~chosen(entropy_T, mask_T, 0.4, largest=False))
    with pytest.raises(UsageError, match="--rho-keep needs"):
        apply_gates(Gates(rho_keep=0.5), *rest, sparse, shard=SHARD, chunk_bytes=1 << 14)
    with pytest.raises(UsageError, match="--kd-entropy-gate needs"):
        without = SparseTargets(ids_TK, sparse.log_probs_TK)
        apply_gates(Gates(entropy_gate=0.5), *rest, without, shard=SHARD, chunk_bytes=1 << 14)


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data, and a teacher that has learnt enough for tokens to differ."""
    folder: Path = tmp_path_factory.mktemp("objective")
    data, teacher = write_dataset(folder / "data"), str(folder / "teacher")
    tree = make_tree(data, training={"train_iters": 20}, checkpoint={"save": teacher}, optim={"lr": 1e-2})
    assert world(1).run(run_training, tree) == [0]
    return {"data": data, "teacher": teacher}


SPLITS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


@pytest.mark.parametrize("divergence", [slow("generalised_jsd"), slow("adaptive_kl"), slow("taid"), "decoupled"])
def test_a_gated_step_equals_one_process(divergence: str, setting: dict[str, Any], world: Worlds) -> None:
    tree = make_tree(
        setting["data"],
        teacher={"load": setting["teacher"]},
        objective={
            "kd_divergence": divergence,
            "kd_temperature": 2.0,
            "kd_entropy_gate": 0.2,
            "rho_keep": 0.7,
            "z_loss_coeff": 1e-2,
        },
    )
    whole = world(1).run(one_step, tree)[0]
    assert whole["kd_share"] == pytest.approx(0.7 * 0.8, abs=0.03) and whole["tokens"] == pytest.approx(90, abs=4)
    assert whole["loss"] == pytest.approx(
        0.5 * whole["lm"] + 0.5 * whole["kd"] * whole["kd_share"] * 8 * 16 / whole["tokens"] + 1e-2 * whole["z_loss"]
    )
    assert whole["t"] == (0.4 if divergence == "taid" else None)
    for name, parallel in SPLITS.items():
        for result in world(2).run(one_step, {**tree, "parallel": parallel}):
            for key in whole:  # kd is a difference of logarithms of about 5
                assert result[key] == (None if whole[key] is None else pytest.approx(whole[key], rel=1e-5, abs=1e-6)), (
                    f"{name}: {key}"
                )


@pytest.mark.slow
def test_a_reference_model_alone_selects_tokens(setting: dict[str, Any], world: Worlds) -> None:
    """Rho-1 without distillation: alpha 0 and a teacher that only chooses."""
    tree = make_tree(
        setting["data"], teacher={"load": setting["teacher"]}, objective={"kd_alpha": 0.0, "rho_keep": 0.5}
    )
    found = world(1).run(one_step, tree)[0]
    plain = world(1).run(one_step, make_tree(setting["data"]))[0]
    assert found["kd"] is None and found["kd_share"] is None
    assert found["tokens"] == plain["tokens"] / 2 and found["loss"] == pytest.approx(found["lm"], rel=1e-7)
    assert abs(found["lm"] - plain["lm"]) > 1e-3


class PoisonedTeacher:
    """A teacher that says NaN of one token of the second sample in the second microbatch."""

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    def targets(self, batch: Any) -> Iterator[Any]:
        for index, targets in enumerate(self._teacher.targets(batch)):
            hidden_TH = targets.hidden_TH.clone()
            if index == 1:
                hidden_TH[5 * batch.microbatch(0).tokens_BS.shape[0] + 1] = torch.nan
            yield replace(targets, hidden_TH=hidden_TH)


def poisoned_step(tree: dict[str, Any]) -> tuple[str, int]:
    """What the error of a step says, and the sample it should name."""
    from megakd.errors import NonFiniteError
    from megakd.parallel import init_parallel
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    groups = init_parallel(config.parallel, seed=5)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    batch = next(batches)
    try:
        run_step(student, batch, PoisonedTeacher(teacher), objective, groups, step=7)
    except NonFiniteError as error:
        return str(error), int(batch.microbatch(1).sample_ids_B[1])
    return "applied", -1


@pytest.mark.parametrize("divergence", ["generalised_jsd", slow("adaptive_kl"), slow("taid")])
def test_a_teacher_that_is_not_finite_is_named(divergence: str, setting: dict[str, Any], world: Worlds) -> None:
    tree = make_tree(
        setting["data"],
        teacher={"load": setting["teacher"]},
        parallel={"tensor_model_parallel_size": 2},
        objective={"kd_divergence": divergence, "kd_entropy_gate": 0.2, "rho_keep": 0.7},
    )
    for text, sample in world(2).run(poisoned_step, tree):
        assert f"rank 0: dataset 0 sample {sample};" in text and f"rank 1: dataset 0 sample {sample})" in text
