"""Doubts about a selection: refused before it for scores of the wrong kind, warned of after it for lopsided rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megakd.data.scores.artefact import Scores
from megakd.data.scores.sources import Source, open_sources
from megakd.errors import UsageError
from megakd.pipeline.select.config import SelectConfig, read_numbers
from megakd.pipeline.select.keys import share_of

DEGENERATE = 0.95


def open_scored(config: SelectConfig) -> list[Source]:
    """Open the scores that the flags name, one source for each output.

    Raises UsageError for a proxy's predictions where a model's scores are asked for, for a model's scores where
    predictions are, and for scores of a sample; and whatever ``open_sources`` raises.
    """
    models = {name: folders for name, (_, folders) in config.models().items()}
    for name, folders in models.items():
        for folder in folders:
            predicts = "predicts" in Scores(folder).manifest.parameters
            if config.proxy_scores and not predicts:
                raise UsageError(
                    f"--proxy-scores {folder}: the scores of a model, not a proxy's predictions ('megakd score "
                    "--proxy'); give two models' by --teacher-scores and --reference-scores"
                )
            if predicts and not config.proxy_scores and not config.scores:
                raise UsageError(
                    f"--{name}-scores {folder}: a proxy's predictions of the difference already; give them alone, "
                    "by --proxy-scores"
                )
    sources = open_sources(
        models,
        outputs=config.output,
        data_path=config.data_path,
        normalise=config.normalise,
        exclude_ids=config.exclude_ids,
        tokenizer_model=config.tokenizer_model,
    )
    for source in sources:
        _refuse_sampled(source)
    return sources


def _refuse_sampled(source: Source) -> None:
    scores = source.any_scores
    if scores.sampled is not None:
        how = ", ".join(f"{key} {value}" for key, value in scores.sampled.items() if key != "num_scored")
        raise UsageError(
            f"{scores.folder}: scores of {scores.sampled['num_scored']} of {scores.num_samples} samples "
            f"({how}); the others would be dropped unseen. 'megakd proxy' "
            "learns from these, and 'megakd score --proxy DIR' scores them all; or score all of them"
        )


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
