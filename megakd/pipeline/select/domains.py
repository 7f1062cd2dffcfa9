"""Domains: the samples of each, and how much of each is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megakd.data.samples.protocol import Samples
from megakd.data.scores.sources import Source
from megakd.errors import UsageError
from megakd.pipeline.select.config import REST, read_numbers
from megakd.pipeline.select.keys import DomainRange, Keys, share_of


@dataclass(frozen=True)
class Allocation:
    """The rule that shares out a ratio of all samples, or of all their tokens, to the domains.

    kind: one threshold for all domains, the same ratio of each, or quotas. quota, floor, cap: entries DOMAIN=SHARE, as
    the flags of these names take them.
    """

    kind: Literal["global", "equal", "quota"]
    ratio: float
    ratio_of: Literal["samples", "tokens"]
    quota: Sequence[str] = ()
    floor: Sequence[str] = ()
    cap: Sequence[str] = ()


@dataclass(frozen=True)
class Share:
    """Domains that share one threshold, and how many samples or tokens of them to keep."""

    domains: tuple[str, ...]
    budget: int


def read_ranges(domains: str | None, sources: Sequence[Source]) -> list[DomainRange]:
    """Cut all samples of all sources into ranges of one domain each, in order.

    domains: a file of ranges of documents, for one source; None: each source is a domain, by its output's name.

    Raises UsageError for domains that overlap or that the dataset has no documents for.
    """
    if domains is None:
        names = [source.output.name for source in sources]
        if len(set(names)) != len(names):
            outputs = " ".join(str(source.output) for source in sources)
            raise UsageError(f"--output {outputs}: the folders name the domains: give them other names")
        return [DomainRange(index, 0, source.num_samples, names[index]) for index, source in enumerate(sources)]
    samples = sources[0].samples
    assert samples is not None  # --domains needs --data-path
    ranges, at = [], 0
    for name, first, stop in _read_lines(Path(domains), samples):
        begin, end = (first_sample_from(samples, _token_position(samples, document)) for document in (first, stop))
        if begin > at:
            ranges.append(DomainRange(0, at, begin, REST))
        if end > begin:
            ranges.append(DomainRange(0, begin, end, name))
        at = max(at, end)
    if at < samples.num_samples:
        ranges.append(DomainRange(0, at, samples.num_samples, REST))
    return ranges


def first_sample_from(samples: Samples, token_position: int) -> int:
    """The first sample that starts at ``token_position`` or behind it."""
    low, high = 0, samples.num_samples
    while low < high:
        middle = (low + high) // 2
        if int(samples.starts(np.array([middle]))[0]) < token_position:
            low = middle + 1
        else:
            high = middle
    return low


def allocate(
    allocation: Allocation,
    keys: Keys,
    ranges: Sequence[DomainRange],
    amounts: Mapping[str, int],
    find: Callable[[Sequence[DomainRange], int], int],
) -> list[Share]:
    """Share out the budget to domains, or groups of domains, of one threshold each.

    amounts: candidates of each domain, in samples or tokens as the ratio counts. find: returns the threshold of some
    ranges for a budget.

    Raises UsageError for unknown domains and for bounds that contradict one another.
    """
    budget = share_of(allocation.ratio, sum(amounts.values()))
    if allocation.kind == "equal":
        return [Share((name,), share_of(allocation.ratio, amount)) for name, amount in amounts.items()]
    if allocation.kind == "quota":
        quota = _known(allocation.quota, "--quota", amounts)
        if set(quota) != set(amounts) or abs(sum(quota.values()) - 1) > 1e-9:
            raise UsageError(
                f"--quota {' '.join(allocation.quota)}: expected a share for each of {', '.join(amounts)}, 1 in sum"
            )
        return [Share((name,), share_of(quota[name], budget)) for name in amounts]
    if not (allocation.floor or allocation.cap):
        return [Share(tuple(amounts), budget)]
    floors, caps = _known(allocation.floor, "--floor", amounts), _known(allocation.cap, "--cap", amounts)
    low = {name: share_of(floors.get(name, 0.0), amount) for name, amount in amounts.items()}
    high = {name: share_of(caps.get(name, 1.0), amount) for name, amount in amounts.items()}
    for name in amounts:
        if low[name] > high[name]:
            raise UsageError(f"--floor {floors[name]} of {name} is above its --cap {caps[name]}")
    if not sum(low.values()) <= budget <= sum(high.values()):
        raise UsageError(
            f"--ratio {allocation.ratio} keeps {budget} {allocation.ratio_of}; with --floor and --cap it is between "
            f"{sum(low.values())} and {sum(high.values())}"
        )
    return _bounded(keys, ranges, budget, low, high, find, by_tokens=allocation.ratio_of == "tokens")


def _bounded(
    keys: Keys,
    ranges: Sequence[DomainRange],
    budget: int,
    low: Mapping[str, int],
    high: Mapping[str, int],
    find: Callable[[Sequence[DomainRange], int], int],
    *,
    by_tokens: bool,
) -> list[Share]:
    """One threshold t for all domains, but each between its bounds: sum over d of clip(kept_d(t), low_d, high_d) =
    budget.

    Each turn finds t for the domains that are still free. If what lacks below the bounds is more than what exceeds
    them, the final t lies higher and those below stay at their floor; else those above stay at their cap (Bitran and
    Hax 1981, "Disaggregation and resource allocation using convex knapsack problems with bounded variables").
    """
    fixed: dict[str, int] = {}
    while free := [name for name in low if name not in fixed]:
        left = max(0, budget - sum(fixed.values()))
        threshold = find([within for within in ranges if within.domain in free], left)
        kept = dict.fromkeys(free, 0)
        for within in ranges:
            if within.domain in kept:
                kept[within.domain] += keys.keep(within, threshold)[by_tokens]
        lacking = {name: low[name] - kept[name] for name in free if kept[name] < low[name]}
        exceeding = {name: kept[name] - high[name] for name in free if kept[name] > high[name]}
        if not lacking and not exceeding:
            break
        if sum(lacking.values()) > sum(exceeding.values()):
            fixed |= {name: low[name] for name in lacking}
        else:
            fixed |= {name: high[name] for name in exceeding}
    free = [name for name in low if name not in fixed]
    shares = [Share((name,), fixed[name]) for name in low if name in fixed]
    return shares + ([Share(tuple(free), max(0, budget - sum(fixed.values())))] if free else [])


def _known(entries: Sequence[str], flag: str, domains: Mapping[str, int]) -> dict[str, float]:
    numbers = read_numbers(entries, flag)
    for name, number in numbers.items():
        if name not in domains:
            raise UsageError(f"{flag} {name}: no such domain; there are {', '.join(domains)}")
        if not 0 <= number <= 1:
            raise UsageError(f"{flag} {name}={number}: expected a share from 0 to 1")
    return numbers


def _read_lines(path: Path, samples: Samples) -> list[tuple[str, int, int]]:
    """The lines of a file of domains, in the order of their documents."""
    if not path.is_file():
        raise UsageError(f"--domains {path}: no such file")
    ranges = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--domains {path}: {error}; expected lines of UTF-8, NAME FIRST STOP") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3 or not (words[1].isdecimal() and words[2].isdecimal()):
            raise UsageError(f"{path}:{number}: {line!r}: expected NAME FIRST STOP, documents of which STOP is not one")
        ranges.append((words[0], int(words[1]), int(words[2])))
    ranges.sort(key=lambda line: line[1:])
    at, num_documents = 0, samples.dataset.num_documents
    for name, first, stop in ranges:
        if not at <= first <= stop <= num_documents:
            raise UsageError(
                f"{path}: domain {name}, documents {first} to {stop}: expected an ascending range that overlaps no "
                f"other, of {num_documents} documents"
            )
        at = stop
    return ranges


def _token_position(samples: Samples, document: int) -> int:
    dataset = samples.dataset
    sequence = int(dataset.document_indices[document])
    return int(dataset.pointers[sequence]) // dataset.dtype.itemsize if sequence < len(dataset) else dataset.num_tokens
