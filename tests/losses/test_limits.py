"""Limits of divergences where a probability is 0, an exponent negative, or the head is the whole vocabulary."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from losses.twin import logits_twin
from marks import slow
from torch import Tensor
from worlds import Worlds

from megakd.losses.head import KD, KDTerm, VocabShard
from megakd.losses.kernels.choose import Implementation
from megakd.losses.logits import logits_loss
from megakd.losses.terms import LEGAL
from megakd.targets import LogitTargets

VOCAB, ROWS = 83, 3
EXPONENTS = list(itertools.product((-1.3, -0.5, 0.0, 0.5, 1.2), repeat=2))


def _problem(ruled_out: str) -> tuple[Tensor, Tensor]:
    """Logits of both models; in row 1 some ids are ruled out, and in row 2 ids that matter are ruled out by both."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(ROWS, VOCAB, generator=generator) * 2 for _ in range(2))
    if ruled_out in ("teacher", "each"):
        teacher[1, [5, 60]] = -math.inf
    if ruled_out in ("student", "each"):
        student[1, [7, 70]] = -math.inf
    student[2, 20:40] = teacher[2, 20:40] = -math.inf
    return student, teacher


def _run(terms: list[KDTerm], student: Tensor, teacher: Tensor, how: Implementation) -> list[tuple[Tensor, Tensor]]:
    """Values of every term and this rank's slice of the gradient. Runs on every rank of a world."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    width = -(-VOCAB // size)
    start = rank * width

    def cut(logits: Tensor) -> Tensor:
        piece = logits[:, start : start + width]
        return torch.nn.functional.pad(piece, (0, width - piece.shape[1]), value=math.nan).contiguous()

    results = []
    for term in terms:
        leaf = cut(student).requires_grad_()
        output = logits_loss(
            leaf,
            torch.arange(ROWS),
            shard=VocabShard(start, width, VOCAB, dist.group.WORLD if size > 1 else None),
            lm_weight_T=torch.zeros(ROWS),
            kd=[KD(term, LogitTargets(cut(teacher)), torch.ones(ROWS))],
            implementation=how,
        )
        output.loss.backward()
        assert leaf.grad is not None
        results.append((output.kd[0].value_T, leaf.grad))
    return results


def _is_infinite(term: KDTerm, ruled_out: str) -> bool:
    """Return whether an id with p = 0 < q, or with q = 0 < p, makes the divergence infinite; derived by hand."""
    a, b = term.ab_alpha, term.ab_beta
    at_p, at_q = {
        "alpha_beta": (not (a > 0 and a + b > 0), not (b > 0 and a + b > 0)),
        "logit_mse": (True, True),
        "centred_logit_mse": (True, True),
        "forward_kl": (False, True),
        "soft_cross_entropy": (False, True),
        "decoupled": (False, True),
        "reverse_kl": (True, False),
        "symmetric_kl": (True, True),
        "adaptive_kl": (True, True),
        "taid": (False, False),
    }.get(term.divergence, (False, False))
    return (at_p and ruled_out in ("teacher", "each")) or (at_q and ruled_out in ("student", "each"))


@pytest.mark.parametrize("size", [1, slow(2)])
@pytest.mark.parametrize("how", ["reference", "native"])
@pytest.mark.parametrize("ruled_out", ["teacher", "student", "each"])
def test_a_divergence_is_infinite_where_its_limit_is(
    world: Worlds, size: int, how: Implementation, ruled_out: str
) -> None:
    terms = [KDTerm("alpha_beta", ab_alpha=a, ab_beta=b) for a, b in EXPONENTS]
    terms += [KDTerm(name, temperature=tau) for name in LEGAL if name != "alpha_beta" for tau in (1.0, 1.7)]
    student, teacher = _problem(ruled_out)
    answers = world(size).run(_run, terms, student, teacher, how)
    for index, term in enumerate(terms):
        value = answers[0][index][0]
        gradient = torch.cat([answer[index][1] for answer in answers], 1)[:, :VOCAB]
        if _is_infinite(term, ruled_out):
            assert value[1] == math.inf, (term, value)
        else:
            assert value[1].isfinite() and gradient[1].isfinite().all(), (term, value)
        assert value[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all(), (term, value)


@pytest.mark.parametrize("size", [1, slow(2), slow(4)])
@pytest.mark.parametrize("how", ["reference", "native"])
def test_negative_exponents_equal_the_twin(world: Worlds, size: int, how: Implementation) -> None:
    terms = [KDTerm("alpha_beta", ab_alpha=a, ab_beta=b) for a, b in EXPONENTS]
    student, teacher = _problem("none")
    student, teacher = student[:2], teacher[:2]
    answers = world(size).run(_run_two, terms, student, teacher, how)
    for index, term in enumerate(terms):
        twin = logits_twin(student, torch.arange(2), torch.zeros(2), [(term, teacher, torch.ones(2))])
        gradient = torch.cat([answer[index][1] for answer in answers], 1)[:, :VOCAB]
        for actual, expected in ((answers[0][index][0], twin.kd_T[0]), (gradient, twin.gradients[0])):
            assert (actual - expected).abs().max() <= 3e-5 * expected.abs().max(), term


def _run_two(terms: list[KDTerm], student: Tensor, teacher: Tensor, how: Implementation) -> list[tuple[Tensor, Tensor]]:
    def three(logits: Tensor) -> Tensor:
        return torch.cat([logits, logits[:1]])

    return [(value[:2], gradient[:2]) for value, gradient in _run(terms, three(student), three(teacher), how)]


@pytest.mark.parametrize("how", ["reference", "native"])
def test_what_overflows_is_infinite_and_equal_ids_are_zero(how: Implementation) -> None:
    """Log-probabilities near -150 under an exponent of -1: nothing is ruled out, and fp32 ends at e^88."""
    student, teacher = _problem("none")
    student[:2, 11], teacher[:2, 11] = -150.0, -150.0
    teacher[1, 12] = -150.0
    student[0], teacher[2] = teacher[0], student[2]
    for a, b in ((-1.0, -1.0), (-1.0, 0.5), (-1.0, 1.0), (0.5, -1.0), (0.0, -1.0), (-1.0, 0.0)):
        value, _ = _run([KDTerm("alpha_beta", ab_alpha=a, ab_beta=b)], student, teacher, how)[0]
        assert value[[0, 2]].isfinite().all() and not value.isnan().any(), (a, b, value)


@pytest.mark.parametrize("how", ["reference", "native"])
@pytest.mark.parametrize("divergence", ["alpha_beta", "centred_logit_mse", "logit_mse"])
def test_nan_logits_stay_nan(how: Implementation, divergence: str) -> None:
    student, teacher = _problem("none")
    teacher[1, 9] = math.nan
    for a, b in ((-1.3, 0.5), (0.0, -0.5), (0.5, -0.5)):
        value, _ = _run([KDTerm(divergence, ab_alpha=a, ab_beta=b)], student, teacher, how)[0]
        assert value.isnan().tolist() == [False, True, False], (a, b)


@pytest.mark.parametrize("how", ["reference", "native"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_adaptive_kl_at_its_ends(how: Implementation, seed: int) -> None:
    """mu 1 is forward KL to the bit, in rows whose fp32 probabilities add up to more than 1 as in others; at mu 0 the
    head is the best id."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, VOCAB, generator=generator) * 3 for _ in range(2))
    terms = [KDTerm("adaptive_kl", akl_mu=1.0), KDTerm("forward_kl"), KDTerm("adaptive_kl", akl_mu=0.0)]
    whole, forward, best = _run(terms, student, teacher, how)
    assert torch.equal(whole[0], forward[0]) and torch.equal(whole[1], forward[1])
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    gap = (p - q).abs()
    share = gap.gather(1, p.argmax(1, keepdim=True))[:, 0] / gap.sum(1)
    kl, reverse = (p * (p / q).log()).sum(1), (q * (q / p).log()).sum(1)
    torch.testing.assert_close(best[0].double(), share * kl + (1 - share) * reverse, rtol=1e-5, atol=1e-6)
