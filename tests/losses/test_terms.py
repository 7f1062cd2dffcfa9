"""Terms: the parameters that are refused, and the targets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from losses.cases import CASES
from losses.head_problem import Problem

from megakd.errors import UsageError
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.head import KD, VocabShard, head_loss
from megakd.losses.pointwise import POINTWISE
from megakd.losses.terms import ALL_TAILS, LEGAL, KDTerm, legality_table
from megakd.targets import SparseTargets

KINDS = ("dense", "top_p_k", "samples", "renormalised_samples")
LINEAR = {"forward_kl", "soft_cross_entropy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is not one of"),
        ({"tail": "tail"}, "tail 'tail' is not one of"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"temperature_on": "student"}, "temperature_on 'student' is not one of"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"reverse_weight": 1.5}, "reverse_weight is 1.5"),
        ({"jsd_beta": -0.1}, "jsd_beta is -0.1"),
        ({"skew_alpha": 1.0}, "skew_alpha is 1.0"),
        ({"akl_mu": 2.0}, "akl_mu is 2.0"),
        ({"taid_t": -1.0}, "taid_t is -1.0"),
        ({"dkd_beta": -1.0}, "dkd_beta is -1.0"),
        ({"ab_alpha": float("inf")}, "ab_alpha is inf"),
    ],
)
def test_wrong_terms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KDTerm(**options)


def test_samples_go_with_linear_losses_alone() -> None:
    for divergence, kind in itertools.product(LEGAL, ("samples", "renormalised_samples")):
        if divergence in LINEAR:
            KDTerm(divergence).check(kind)
            continue
        with pytest.raises(UsageError, match="linear in the teacher"):
            KDTerm(divergence).check(kind)


def test_what_gives_mass_to_an_id_without_any_is_refused() -> None:
    """Reverse KL is infinite where the teacher lists nothing; so are the ends of the families that tend to it."""
    for term in (
        KDTerm("reverse_kl", tail="renormalise"),
        KDTerm("symmetric_kl", tail="label"),
        KDTerm("generalised_jsd", jsd_beta=1.0, tail="renormalise"),
        KDTerm("skew_reverse_kl", skew_alpha=0.0, tail="label"),
    ):
        with pytest.raises(UsageError, match="with tail"):
            term.check("top_p_k")


def test_the_tail_at_another_temperature_is_unknown() -> None:
    for tail in ALL_TAILS:
        term = KDTerm(temperature=2.0, tail=tail)
        if tail == "renormalise":
            term.check("top_p_k")
            continue
        with pytest.raises(UsageError, match="temperature 2.0"):
            term.check("top_p_k")
    with pytest.raises(UsageError, match=r"temperature 2.0.*samples"):
        KDTerm(temperature=2.0).check("samples")


def test_everything_has_a_formula_and_a_case() -> None:
    for divergence, kinds in LEGAL.items():
        assert KDTerm(divergence).formula in DIVERGENCES
        assert set(kinds) <= set(KINDS) and "dense" in kinds
        if len(kinds) > 1:
            assert divergence in POINTWISE
        for kind, tails in kinds.items():
            for tail in tails or ("none",):
                found = (c for c in CASES if (c.term.divergence, c.kind, c.term.tail) == (divergence, kind, tail))
                assert next(found, None), (divergence, kind, tail)


def test_ends_of_families_are_the_divergences_they_end_in() -> None:
    assert KDTerm("generalised_jsd", jsd_beta=0.0).formula == "forward_kl"
    assert KDTerm("generalised_jsd", jsd_beta=1.0).formula == "reverse_kl"
    assert KDTerm("skew_forward_kl", skew_alpha=0.0).formula == "forward_kl"
    assert KDTerm("skew_reverse_kl", skew_alpha=0.0).formula == "reverse_kl"
    assert KDTerm("symmetric_kl", reverse_weight=0.0).formula == "forward_kl"
    assert KDTerm("symmetric_kl", reverse_weight=1.0).formula == "reverse_kl"
    assert KDTerm("symmetric_kl").formula == "symmetric_kl"
    assert KDTerm("taid").formula == "forward_kl"


def test_the_table_is_printed_whole() -> None:
    table = legality_table()
    for divergence, kinds in LEGAL.items():
        line = next(line for line in table.splitlines() if line.startswith(divergence + " "))
        for kind, tails in kinds.items():
            assert kind == "dense" or f"{kind} ({', '.join(tails)})" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[3, 3]]}, "list id 3 twice"),
        ({"ids": [[3, 251]]}, "list id 251, which is none of the vocabulary of 251"),
        ({"ids": [[3, -5]]}, "list id -5"),
        ({"ids": [[3, -1]]}, "list id -1"),
        ({"ids": [[3, 4]], "kind": "topk"}, "targets of kind 'topk'"),
        ({"ids": [[3, 4]], "kind": "samples", "divergence": "reverse_kl"}, "linear in the teacher"),
        ({"ids": [[3, 4]], "divergence": "reverse_kl"}, "with tail none: expected ghost"),
        ({"ids": [[3, 4, 5]]}, r"targets.log_probs_TK has shape \(7, 2\), expected \(7, 3\)"),
    ],
)
def test_wrong_sparse_targets_are_refused(change: dict[str, Any], message: str) -> None:
    problem = Problem.make()
    ids_TK = torch.tensor(change["ids"]).expand(7, -1)
    targets = SparseTargets(ids_TK, torch.full((7, 2), -2.0), change.get("kind", "top_p_k"))
    with pytest.raises(UsageError, match=message):
        head_loss(
            problem.hidden_TH,
            problem.weight_VH,
            problem.labels_T,
            shard=VocabShard(0, 256, 251, None),
            lm_weight_T=problem.lm_weight_T,
            kd=[KD(KDTerm(change.get("divergence", "forward_kl")), targets, problem.kd_weight_T)],
        )
