"""Every divergence on every kind of targets that it may be fed, with every tail and every mode of temperature."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.terms import LEGAL, KDTerm
from megakd.targets import SparseTargets

TEMPERATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"temperature": 2.5, "scale_by_temperature_squared": False},
    {"temperature": 0.5, "temperature_on": "teacher"},
]
PARAMETERS: dict[str, list[dict[str, float]]] = {
    "symmetric_kl": [{}, {"reverse_weight": 0.9}],
    "generalised_jsd": [{}, {"jsd_beta": 0.1}, {"jsd_beta": 0.0}, {"jsd_beta": 1.0}],
    "skew_forward_kl": [{}, {"skew_alpha": 0.0}],
    "skew_reverse_kl": [{}, {"skew_alpha": 0.0}],
    "adaptive_kl": [{}, {"akl_mu": 0.0}, {"akl_mu": 0.9}, {"akl_mu": 1.0}],
    "alpha_beta": [
        {"ab_alpha": a, "ab_beta": b}
        for a, b in [(0.5, 0.5), (0.3, 0.9), (0, 0.7), (0.7, 0), (1, 0), (0, 1), (0, 0), (0.5, -0.5), (1.2, -0.2)]
    ],
    "taid": [{}, {"taid_t": 0.0}, {"taid_t": 1.0}],
    "decoupled": [{}, {"dkd_alpha": 0.5, "dkd_beta": 0.0}],
}


@dataclass(frozen=True)
class Case:
    term: KDTerm
    kind: str

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self.term).items() if v != getattr(KDTerm(), k)]
        return "-".join([self.kind, *changed])


def _legal() -> list[Case]:
    cases = []
    for divergence, kinds in LEGAL.items():
        variants = itertools.product(PARAMETERS.get(divergence, [{}]), TEMPERATURES)
        for (parameters, temperature), (kind, tails) in itertools.product(variants, kinds.items()):
            for tail in tails or ("none",):
                term = replace(KDTerm(divergence, tail=tail), **parameters, **temperature)
                try:
                    term.check(kind)
                except UsageError:
                    continue  # what is refused is tested in test_terms.py
                cases.append(Case(term, kind))
    return cases


CASES = _legal()
DENSE = [case for case in CASES if case.kind == "dense"]
SPARSE = [case for case in CASES if case.kind != "dense"]
UNSCALED = [case for case in CASES if case.term.scale_by_temperature_squared]
"""Without those that are another one times a number, which the head is asked about and no kernel needs to be."""


def sparse_targets(kind: str, teacher_TV: Tensor, seed: int = 0) -> SparseTargets:
    """Up to nine ids a row; the last rows list fewer (top_p_k) or draw some ids not at all."""
    generator = torch.Generator().manual_seed(seed)
    log_p_TV = teacher_TV.double().log_softmax(-1)
    log_p_TK, ids_TK = log_p_TV.topk(min(9, teacher_TV.shape[1]), -1)
    if kind == "samples":
        counts_TK = torch.randint(0, 4, ids_TK.shape, generator=generator)
        counts_TK[:, 0] += 1
        targets = SparseTargets.from_counts(ids_TK, counts_TK)
        # weighted draws sum to 1 on average only
        factors_T = torch.linspace(0.5, 2, len(ids_TK)).where(torch.arange(len(ids_TK)) % 2 == 0, 1.0)
        return replace(targets, log_probs_TK=targets.log_probs_TK + factors_T.log().unsqueeze(1))
    if kind == "renormalised_samples":
        return SparseTargets(ids_TK, log_p_TK.log_softmax(-1).float(), "renormalised_samples")
    log_p_TK[len(log_p_TK) // 2 :, 6:] = -torch.inf
    ids_TK = torch.where(log_p_TK == -torch.inf, 10**6, ids_TK)  # an empty slot may hold anything
    return SparseTargets(ids_TK, log_p_TK.float())
