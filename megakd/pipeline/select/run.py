"""One selection for each dataset: the threshold of each domain's scores, and the ids of the samples that reach it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, find_finished, say_complete
from megakd.data.scores.sources import Source
from megakd.data.selection import FORMAT, MANIFEST, VERSION, SelectionWriter
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.select.config import SelectConfig
from megakd.pipeline.select.domains import Allocation, Share, allocate, read_ranges
from megakd.pipeline.select.keys import NOTHING, DomainRange, Keys, Rule, Survey, score_at, share_of

_RECORDED = (
    "normalise",
    "rank_difference",
    "ratio",
    "ratio_of",
    "allocation",
    "quota",
    "floor",
    "cap",
    "drop_negative",
    "drop_top_fraction",
    "gumbel_temperature",
    "seed",
)


@dataclass
class Domain:
    """Samples and tokens of one domain: candidates, and what was kept."""

    candidates: int = 0
    candidate_tokens: int = 0
    kept: int = 0
    kept_tokens: int = 0
    threshold: float | None = None
    """The least score kept, noise included; None if all samples are kept, or none."""


@dataclass(frozen=True)
class Outcome:
    """Results of a run of select."""

    manifests: list[Manifest]
    domains: dict[str, Domain]
    correlations: dict[str, float]
    """Pearson's correlation of the score with each model's NLL, or with its rank."""
    survey: Survey


def select(config: SelectConfig, sources: Sequence[Source]) -> Outcome:
    """Write one selection for each source.

    A finished selection by the same rule is kept. Raises MismatchError for one by another rule; CorruptError for scores
    that are not finite, with the first sample ids; UsageError for settings that keep nothing, that contradict one
    another, or whose weights make finite scores infinite.
    """
    weights = {name: weight for name, (weight, _) in config.models().items()}
    recorded = {**{name: getattr(config, name) for name in _RECORDED}, "weights": weights}
    rules = [_recorded_rule(recorded, sources, source) for source in sources]
    for source, recorded_rule in zip(sources, rules):
        _find_selection(source, recorded_rule)
    ranges = read_ranges(config.domains, sources)
    by_tokens = config.ratio_of == "tokens"
    threads = config.threads or len(os.sched_getaffinity(0))
    # In the order of the names: the last bit of a sum of three depends on it, and must not on the order of the flags.
    rule = Rule(dict(sorted(weights.items())), config.seed)
    keys = Keys(sources, rule, threads=threads)
    surveys, counts = _survey(keys, ranges, by_tokens=by_tokens, weights_flag=config.weights_given)
    if config.rank_difference:
        rule = replace(rule, nll_ranks=keys.nll_ranks(ranges))
        keys = Keys(sources, rule, threads=threads)
        surveys, counts = _survey(keys, ranges, by_tokens=by_tokens, weights_flag=config.weights_given)
    total = Survey.sum(surveys)
    final = replace(rule, drop_negative=config.drop_negative, gumbel_temperature=config.gumbel_temperature)
    if config.drop_top_fraction:
        budget = share_of(config.drop_top_fraction, total.candidates)
        final = replace(final, below=keys.threshold(ranges, budget, by_tokens=False))
    if final != rule:
        keys = Keys(sources, final, threads=threads)

    def find(some: Sequence[DomainRange], budget: int) -> int:
        known = final == rule and len(some) == len(ranges)
        return keys.threshold(some, budget, by_tokens=by_tokens, counts=counts if known else None)

    domains: dict[str, Domain] = {}
    for within, survey in zip(ranges, surveys):
        domain = domains.setdefault(within.domain, Domain())
        domain.candidates += survey.candidates
        domain.candidate_tokens += survey.tokens
    amounts = {name: d.candidate_tokens if by_tokens else d.candidates for name, d in domains.items()}
    allocation = Allocation(
        kind=config.allocation,
        ratio=config.ratio,
        ratio_of=config.ratio_of,
        quota=config.quota,
        floor=config.floor,
        cap=config.cap,
    )
    shares = allocate(allocation, keys, ranges, amounts, find)
    thresholds = _thresholds(allocation, shares, ranges, find, num_candidates=total.candidates)
    manifests = _write(sources, rules, keys, ranges, thresholds, domains)
    correlations = {name: total.correlation(index) for index, name in enumerate(rule.weights)}
    return Outcome(manifests, domains, correlations, total)


def _survey(
    keys: Keys, ranges: Sequence[DomainRange], *, by_tokens: bool, weights_flag: str
) -> tuple[list[Survey], NDArray[np.int64]]:
    """A survey of each range, and counts of the first 16 bits of all keys."""
    counts = np.zeros(1 << 16, np.int64)
    surveys = []
    for within in ranges:
        survey = keys.survey(within, by_tokens=by_tokens, counts=counts)
        if survey.num_bad:
            _refuse_bad(keys.sources[within.source], survey, weights_flag)
        surveys.append(survey)
    return surveys, counts


def _refuse_bad(source: Source, survey: Survey, weights_flag: str) -> None:
    bad = list(survey.bad)
    folders = " and ".join(str(scores.folder) for scores in source.scores.values())
    shown = ", ".join(map(str, bad))
    more = ", ..." if survey.num_bad > len(bad) else ""
    if all(np.isfinite(scores.log_probs[bad]).all() for scores in source.scores.values()):
        raise UsageError(
            f"{weights_flag}: it takes the score of {survey.num_bad} samples beyond what float32 holds, ids "
            f"{shown}{more}; their log-probabilities are finite: give smaller weights"
        )
    raise CorruptError(
        f"{folders}: {survey.num_bad} samples have a score that is not finite: ids {shown}{more}; score "
        "them anew, or leave them out with --exclude-ids FILE"
    )


def _thresholds(
    allocation: Allocation, shares: Sequence[Share], ranges: Sequence[DomainRange], find: Any, *, num_candidates: int
) -> dict[str, int]:
    if not num_candidates:
        raise UsageError(
            "there is no sample to select from: all are excluded by --exclude-ids or have nothing to score"
        )
    if not sum(share.budget for share in shares):
        raise UsageError(
            f"--ratio {allocation.ratio} of the {allocation.ratio_of} there are keeps nothing; raise it, or score more "
            "samples"
        )
    thresholds = {}
    for share in shares:
        own = [within for within in ranges if within.domain in share.domains]
        threshold = find(own, share.budget) if share.budget else NOTHING
        thresholds.update(dict.fromkeys(share.domains, threshold))
    return thresholds


def _write(
    sources: Sequence[Source],
    rules: Sequence[dict[str, Any]],
    keys: Keys,
    ranges: Sequence[DomainRange],
    thresholds: Mapping[str, int],
    domains: dict[str, Domain],
) -> list[Manifest]:
    with ExitStack() as stack:
        writers = [stack.enter_context(SelectionWriter(source.output)) for source in sources]
        for within in ranges:
            domain, threshold = domains[within.domain], thresholds[within.domain]
            samples, tokens = keys.keep(within, threshold, writers[within.source].append)
            domain.kept += samples
            domain.kept_tokens += tokens
            domain.threshold = score_at(threshold)
        if not sum(writer.num_kept for writer in writers):
            raise UsageError("no sample is left to keep: see --drop-negative, --drop-top-fraction, --exclude-ids")
        kept = {name: asdict(domain) for name, domain in domains.items()}
        rules = [{**rule, "domains": kept} for rule in rules]
        there = [_find_selection(source, rule) for source, rule in zip(sources, rules)]
        for writer, done in zip(writers, there):
            if done is not None and not writer.wrote(done):
                raise MismatchError(
                    f"{done.path} keeps other samples by the same rule: the ranges of --domains were others. Give "
                    "another --output, or remove it to select anew"
                )
        return [
            _keep(source, done)
            if done is not None
            else writer.finish(**_samples(source), rule=rule, parents=_parents(source), tokenizer=_tokenizer(source))
            for writer, source, rule, done in zip(writers, sources, rules, there)
        ]


def _find_selection(source: Source, rule: Mapping[str, Any]) -> Manifest | None:
    """The finished selection by this rule from these scores, or None. Raises MismatchError for another one."""
    samples = _samples(source)
    return find_finished(
        source.output / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**{key: value for key, value in samples.items() if key != "dataset"}, "rule": rule},
        parents={**_parents(source), "dataset": samples["dataset"]},
        tokenizer=_tokenizer(source),
        flag="--output",
    )


def _keep(source: Source, done: Manifest) -> Manifest:
    say_complete(source.output)
    return done


def _samples(source: Source) -> dict[str, Any]:
    """The samples that a selection is made from, as its manifest records them."""
    scored = source.any_scores.manifest.parameters
    return {
        "packing": scored["packing"],
        "seq_length": int(scored["seq_length"]),
        "num_samples": source.num_samples,
        "dataset": source.dataset,
    }


def _parents(source: Source) -> dict[str, str]:
    return {f"scores {name}": scores.fingerprint for name, scores in source.scores.items()} | source.excluded_by


def _tokenizer(source: Source) -> Mapping[str, Any] | None:
    return source.any_scores.manifest.tokenizer


def _recorded_rule(settings: Mapping[str, Any], sources: Sequence[Source], source: Source) -> dict[str, Any]:
    """All that the ids of one selection depend on, as its manifest records it beside what was kept of each domain."""
    excluded = np.ascontiguousarray(source.excluded)
    return {
        **settings,
        "excluded_ids": None if not len(excluded) else xxhash.xxh3_128_hexdigest(excluded.data),
        "datasets": sorted(each.dataset for each in sources),
    }
