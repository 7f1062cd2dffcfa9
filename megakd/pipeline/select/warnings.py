"""Warnings about a selection, from its manifest: printed by ``select``, shown on the page of ``report``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.pipeline.select.config import read_numbers
from megakd.pipeline.select.threshold import share_of

DEGENERATE = 0.95


def quota_warnings(rule: Mapping[str, Any]) -> Iterator[str]:
    """Warn of domains that have less than ``--quota`` gives them. rule: the manifest's ``rule``."""
    if rule["allocation"] != "quota":
        return
    by_tokens, domains = rule["ratio_of"] == "tokens", rule["domains"]
    candidates, kept = ("candidate_tokens", "kept_tokens") if by_tokens else ("candidates", "kept")
    budget = share_of(rule["ratio"], sum(domain[candidates] for domain in domains.values()))
    for name, share in read_numbers(rule["quota"], "--quota").items():
        quota, domain = share_of(share, budget), domains[name]
        # a quota of tokens need not be met exactly: the next sample may be too long
        if domain[candidates] < quota or (domain[kept] < quota and not by_tokens):
            yield (
                f"{name}: its quota is {quota} {rule['ratio_of']}, there are {domain[candidates]}, kept are "
                f"{domain[kept]}: the selection is smaller than --ratio {rule['ratio']}, and the other domains are a "
                "larger part of it than --quota says; lower the ratio or this domain's quota"
            )


def degenerate_warnings(weights: Mapping[str, float], correlations: Mapping[str, float]) -> Iterator[str]:
    """Warn of models whose NLL alone ranks the samples almost as the score does. weights, correlations: by model."""
    flags = "--weights"
    if set(weights) == {"teacher", "reference"}:
        flags = f"--teacher-scale (now {-weights['teacher']:g})"
    for name, value in correlations.items():
        if len(correlations) > 1 and abs(value) > DEGENERATE:
            yield (
                f"correlation {value:.3f} of the score with the NLL of {name}: the selection is little more than a "
                f"ranking by {name} alone; change {flags} so that the models weigh alike, or use --rank-difference"
            )
