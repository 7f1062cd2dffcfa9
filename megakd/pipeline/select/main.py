"""``megakd select``: keep the samples that a teacher likes better than a small reference model does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.finished import find_finished, say_complete
from megakd.artefacts.manifest import Manifest
from megakd.config.tree import parse
from megakd.data.scores.artefact import Scores
from megakd.data.scores.sources import Source, open_sources, outdated
from megakd.data.selection import FORMAT, MANIFEST, VERSION, Selection, SelectionWriter
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.pipeline.select.config import RANKS_ARE_BINNED, SelectConfig
from megakd.pipeline.select.domains import Share, allocate, read_pieces
from megakd.pipeline.select.materialize import materialize
from megakd.pipeline.select.threshold import NOTHING, Keys, Piece, Ranks, Rule, Survey, score_at, share_of
from megakd.pipeline.select.warnings import degenerate_warnings, quota_warnings
from megakd.work.console import tell

HELP = "keep the samples with the largest difference of scores"
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
_DESCRIPTION = (
    "Keep the best part of the samples of scored datasets: those with the largest NLL_reference - lambda * "
    "NLL_teacher, or any weighted sum of NLLs. Writes a selection, which training reads with --selection and no token "
    "is copied for; --materialize copies the tokens too, for other programs."
)


@dataclass
class Domain:
    """What was kept of one domain."""

    candidates: int = 0
    candidate_tokens: int = 0
    kept: int = 0
    kept_tokens: int = 0
    threshold: float | None = None
    """The least score kept, noise included; None where all or none are."""


@dataclass(frozen=True)
class Outcome:
    """What a run of select came to."""

    manifests: list[Manifest]
    domains: dict[str, Domain]
    correlations: dict[str, float]
    """Of the score with each model's NLL (or its rank)."""
    survey: Survey


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(SelectConfig, argv, prog="megakd select", description=_DESCRIPTION)
    sources = open_scored(config)
    outcome = select(config, sources)
    tell(_table(outcome), on="stdout")
    if config.rank_difference:
        tell(RANKS_ARE_BINNED, on="stdout")
    rule = outcome.manifests[0].parameters["rule"]
    doubts = [*quota_warnings(rule), *degenerate_warnings(rule["weights"], outcome.correlations)]
    for warning in [*doubts, *(warning for source in sources if (warning := outdated(source)))]:
        tell(f"warning: {warning}")
    for source, manifest in zip(sources, outcome.manifests):
        tell(
            f"{source.output}: {manifest.parameters['num_kept']} samples, fingerprint {manifest.fingerprint}",
            on="stdout",
        )
    for source, prefix in zip(sources, config.materialize):
        assert source.samples is not None  # --materialize needs --data-path
        refined = materialize(source.samples, Selection(source.output), Path(prefix))
        dataset = refined.parameters["dataset"]
        tell(f"{prefix}: {dataset['num_documents']} documents, {dataset['num_tokens']} tokens", on="stdout")
    return ExitStatus.COMPLETE


def open_scored(config: SelectConfig) -> list[Source]:
    """Open the scores that the flags name, one source for each output.

    Raises UsageError for a proxy's predictions where a model's scores are asked for, and the other way round; and what
    ``open_sources`` raises.
    """
    models = {name: folders for name, (_, folders) in config.models().items()}
    _check_roles(config, models)
    return open_sources(
        models,
        outputs=config.output,
        data_path=config.data_path,
        normalise=config.normalise,
        exclude_ids=config.exclude_ids,
        tokenizer_model=config.tokenizer_model,
    )


def select(config: SelectConfig, sources: Sequence[Source]) -> Outcome:
    """Write one selection for each source.

    A selection that is there already and is the same is kept. Raises MismatchError for another one; CorruptError for
    scores that are not finite, with the first sample ids; UsageError for settings that keep
    nothing, that contradict one another, or whose weights make finite scores infinite.
    """
    for source in sources:
        _refuse_sampled(source)
        rule_now = _rule(config, sources, source, {})
        _find_selection(source, {key: value for key, value in rule_now.items() if key != "domains"})
    pieces = read_pieces(config.domains, sources)
    by_tokens = config.ratio_of == "tokens"
    threads = config.threads or len(os.sched_getaffinity(0))
    # In the order of the names: the last bit of a sum of three depends on it, and must not on the order of the flags.
    rule = Rule({name: weight for name, (weight, _) in sorted(config.models().items())}, config.seed)
    surveys, counts = _survey(config, Keys(sources, rule, threads=threads), pieces)
    ranks: Ranks | None = None
    if config.rank_difference:
        ranks = Keys(sources, rule, threads=threads).rank_tables(pieces)
        surveys, counts = _survey(config, Keys(sources, rule, threads=threads, ranks=ranks), pieces)
    whole = Survey.sum(surveys)
    uniform = [Survey.sum(s for s, p in zip(surveys, pieces) if p.source == index) for index in range(len(sources))]
    keys = Keys(sources, rule, threads=threads, ranks=ranks, uniform=uniform)
    final = replace(rule, drop_negative=config.drop_negative, gumbel_temperature=config.gumbel_temperature)
    if config.drop_top_fraction:
        budget = share_of(config.drop_top_fraction, whole.candidates)
        final = replace(final, below=keys.threshold(pieces, budget, by_tokens=False))
    if final != rule:
        keys = Keys(sources, final, threads=threads, ranks=ranks, uniform=uniform)

    def find(some: Sequence[Piece], budget: int) -> int:
        known = final == rule and len(some) == len(pieces)
        return keys.threshold(some, budget, by_tokens=by_tokens, counts=counts if known else None)

    domains: dict[str, Domain] = {}
    for piece, survey in zip(pieces, surveys):
        domain = domains.setdefault(piece.domain, Domain())
        domain.candidates += survey.candidates
        domain.candidate_tokens += survey.tokens
    amounts = {name: d.candidate_tokens if by_tokens else d.candidates for name, d in domains.items()}
    shares = allocate(config, keys, pieces, amounts, find)
    thresholds = _thresholds(config, shares, pieces, find, num_candidates=whole.candidates)
    manifests = _write(config, sources, keys, pieces, thresholds, domains)
    correlations = {name: whole.correlation(index) for index, name in enumerate(rule.weights)}
    return Outcome(manifests, domains, correlations, whole)


def _check_roles(config: SelectConfig, models: Mapping[str, Sequence[str]]) -> None:
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


def _refuse_sampled(source: Source) -> None:
    scores = source.any_scores
    if scores.sampled is not None:
        how = ", ".join(f"{key} {value}" for key, value in scores.sampled.items() if key != "num_scored")
        raise UsageError(
            f"{scores.folder}: scores of {scores.sampled['num_scored']} of {scores.num_samples} samples "
            f"({how}); the others would be dropped unseen. 'megakd proxy' "
            "learns from these, and 'megakd score --proxy DIR' scores them all; or score all of them"
        )


def _survey(config: SelectConfig, keys: Keys, pieces: Sequence[Piece]) -> tuple[list[Survey], NDArray[np.uint64]]:
    """A survey of each piece, and the counts of the first digit of all."""
    counts = np.zeros(1 << 16, np.uint64)
    surveys = []
    for piece in pieces:
        survey = keys.survey(piece, by_tokens=config.ratio_of == "tokens", counts=counts)
        if survey.num_bad:
            _refuse_bad(config, keys, piece, survey)
        surveys.append(survey)
    return surveys, counts


def _refuse_bad(config: SelectConfig, keys: Keys, piece: Piece, survey: Survey) -> None:
    source = keys.sources[piece.source]
    bad: list[int] = []
    for begin in range(survey.first_bad, piece.end, 1 << 16):
        scores = keys.scores(piece.source, begin, min(begin + (1 << 16), piece.end))
        ids = begin + np.flatnonzero(~np.isfinite(scores))
        bad.extend(ids[(source.counts[ids] > 0) & ~np.isin(ids, source.excluded)].tolist())
        if len(bad) >= min(5, survey.num_bad):
            break
    folders = " and ".join(str(scores.folder) for scores in source.scores.values())
    shown = ", ".join(map(str, bad[:5]))
    more = ", ..." if survey.num_bad > 5 else ""
    if all(np.isfinite(scores.log_probs[bad]).all() for scores in source.scores.values()):
        raise UsageError(
            f"{config.weights_given}: it takes the score of {survey.num_bad} samples beyond what float32 holds, ids "
            f"{shown}{more}; their log-probabilities are finite: give smaller weights"
        )
    raise CorruptError(
        f"{folders}: {survey.num_bad} samples have a score that is not finite: ids {shown}{more}; score "
        "them anew, or leave them out with --exclude-ids FILE"
    )


def _thresholds(
    config: SelectConfig, shares: Sequence[Share], pieces: Sequence[Piece], find: Any, *, num_candidates: int
) -> dict[str, int]:
    if not num_candidates:
        raise UsageError(
            "there is no sample to select from: all are excluded by --exclude-ids or have nothing to score"
        )
    if not sum(share.budget for share in shares):
        raise UsageError(
            f"--ratio {config.ratio} of the {config.ratio_of} there are keeps nothing; raise it, or score more samples"
        )
    thresholds = {}
    for share in shares:
        own = [piece for piece in pieces if piece.domain in share.domains]
        threshold = find(own, share.budget) if share.budget else NOTHING
        thresholds.update(dict.fromkeys(share.domains, threshold))
    return thresholds


def _write(
    config: SelectConfig,
    sources: Sequence[Source],
    keys: Keys,
    pieces: Sequence[Piece],
    thresholds: Mapping[str, int],
    domains: dict[str, Domain],
) -> list[Manifest]:
    with ExitStack() as stack:
        writers = [stack.enter_context(SelectionWriter(source.output)) for source in sources]
        for piece in pieces:
            domain, threshold = domains[piece.domain], thresholds[piece.domain]
            samples, tokens = keys.keep(piece, threshold, writers[piece.source].append)
            domain.kept += samples
            domain.kept_tokens += tokens
            domain.threshold = score_at(threshold)
        if not sum(writer.num_kept for writer in writers):
            raise UsageError("no sample is left to keep: see --drop-negative, --drop-top-fraction, --exclude-ids")
        rules = [_rule(config, sources, source, domains) for source in sources]
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
    """The selection that is there, if it was made by this rule from these scores. Raises MismatchError for another."""
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
    """What a selection is of."""
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


def _rule(
    config: SelectConfig, sources: Sequence[Source], source: Source, domains: Mapping[str, Domain]
) -> dict[str, Any]:
    """What the manifest records: all that the ids depend on, and what it came to."""
    excluded = np.ascontiguousarray(source.excluded)
    return {
        **{name: getattr(config, name) for name in _RECORDED},
        "weights": {name: weight for name, (weight, _) in config.models().items()},
        "excluded_ids": None if not len(excluded) else xxhash.xxh3_128_hexdigest(excluded.data),
        "datasets": sorted(each.dataset for each in sources),
        "domains": {name: asdict(domain) for name, domain in domains.items()},
    }


def _table(outcome: Outcome) -> str:
    rows = [("domain", "samples", "kept", "share", "tokens kept", "threshold")]
    for name, d in outcome.domains.items():
        share = f"{d.kept / d.candidates:.4f}" if d.candidates else "-"
        threshold = "-" if d.threshold is None else f"{d.threshold:.6g}"
        rows.append((name, str(d.candidates), str(d.kept), share, str(d.kept_tokens), threshold))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths)))
             for row in rows]  # fmt: skip
    survey = outcome.survey
    known = [f"{name} {value:.3f}" for name, value in outcome.correlations.items()]
    lines.append(
        f"{survey.negative} of {survey.candidates} scores are negative; {survey.excluded} samples excluded, "
        f"{survey.empty} without anything to score; correlation of the score with the NLL of {', '.join(known)}"
    )
    return "\n".join(lines)
