"""What is doubtful about a selection, from what it records: for ``select`` as it ends and the page of ``report``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.pipeline.select.config import read_numbers
from megakd.pipeline.select.threshold import share_of

DEGENERATE = 0.95


def quota_warnings(rule: Mapping[str, Any]) -> Iterator[str]:
    """Domains that could not fill what ``--quota`` gives them. rule: as the manifest records it."""
    if rule["allocation"] != "quota":
        return
    by_tokens, domains = rule["ratio_of"] == "tokens", rule["domains"]
    there, kept = ("candidate_tokens", "kept_tokens") if by_tokens else ("candidates", "kept")
    budget = share_of(rule["ratio"], sum(domain[there] for domain in domains.values()))
    for name, share in read_numbers(rule["quota"], "--quota").items():
        own, domain = share_of(share, budget), domains[name]
        # of tokens a part of a sample may always lack
        if domain[there] < own or (domain[kept] < own and not by_tokens):
            yield (
                f"{name}: its quota is {own} {rule['ratio_of']}, there are {domain[there]}, kept are {domain[kept]}: "
                f"the selection is smaller than --ratio {rule['ratio']}, and the other domains are a larger part of it "
                "than --quota says; lower the ratio or this domain's quota"
            )


def degenerate_warnings(weights: Mapping[str, float], correlations: Mapping[str, float]) -> Iterator[str]:
    """Models by whose NLL alone the score as good as ranks. weights, correlations: by the models' names."""
    flags = "--weights"
    if set(weights) == {"teacher", "reference"}:
        flags = f"--teacher-scale (now {-weights['teacher']:g})"
    for name, value in correlations.items():
        if len(correlations) > 1 and abs(value) > DEGENERATE:
            yield (
                f"correlation {value:.3f} of the score with the NLL of {name}: the selection is little more than a "
                f"ranking by {name} alone; change {flags} so that the models weigh alike, or use --rank-difference"
            )
