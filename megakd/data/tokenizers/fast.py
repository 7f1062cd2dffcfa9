"""The fast engine behind its parity gate: the ids of the reference engine, several times as fast.

`gigatoken` reimplements byte-level and sentencepiece BPE. Before it is used for a tokenizer, both engines are compared
over all of Unicode (`scan`), on hostile strings and on the text of every id, once for a tokenizer and the
versions of the engines, and on a sample of the corpus at every run. Documents that hold a code point beside which they
differ, or a literal such as ``</s>``, go to the reference engine; after any other difference, all documents do.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.file_lock import lock_stream, open_to_lock
from megakd.data.tokenizer import Ragged, Tokenizer, TokenizerType, model_file
from megakd.data.tokenizers import scan as engine_scan
from megakd.data.tokenizers.hostile_texts import hostile_texts, random_texts, vocabulary_texts
from megakd.data.tokenizers.huggingface import HuggingFaceTokenizer, encode_with, load_engine, without_dropout
from megakd.data.tokenizers.probe import build_probe
from megakd.data.tokenizers.routes import Routes, normalised_guises
from megakd.data.tokenizers.scan import EnginePair, scan_code_points
from megakd.data.tokenizers.scan_cache import remember
from megakd.errors import UsageError
from megakd.work.progress import Progress

EngineMode = Literal["auto", "reference", "gigatoken"]

_ENGINES = ("gigatoken", "tokenizers", "sentencepiece")
_COMPARISON_VERSION = 2  # to be raised with any change of the comparison, which makes cached ones void
_PROGRESS_SECONDS = 3.0
_LARGE_BYTES = 2 << 20  # a text above this size may take gigatoken some 35 bytes of memory for each byte


@dataclass(frozen=True)
class Choice:
    """Choice of an engine, with its reason: printed, and recorded in the manifest."""

    engine: Literal["reference", "gigatoken"]
    reason: str
    routed: tuple[str, ...] = ()
    """Literals whose documents go to the reference engine."""
    code_points: tuple[tuple[int, int], ...] = ()
    """First and last code point of the ranges whose documents go there, too."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `from_dict` and the manifest; code points as ``"88F"`` and ``"A7CE-A7CF"``."""
        code_points = [f"{first:X}" if first == last else f"{first:X}-{last:X}" for first, last in self.code_points]
        return {
            "engine": self.engine,
            "reason": self.reason,
            "routed": list(self.routed),
            "code_points": code_points,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """Build a choice from the data of `as_dict`."""
        ranges = [[int(end, 16) for end in text.split("-")] for text in data["code_points"]]
        return cls(data["engine"], data["reason"], tuple(data["routed"]), tuple((ends[0], ends[-1]) for ends in ranges))


def choose_engine(
    tokenizer: Tokenizer,
    sample: Iterable[str],
    *,
    mode: EngineMode = "auto",
    say: Callable[[str], object] = lambda line: None,
) -> Choice:
    """Compare the fast engine with the reference engine, over all of Unicode, on hostile strings and on a sample.

    mode: ``auto`` chooses the fast engine where both agree, ``gigatoken`` raises an error where they do not,
    ``reference`` compares nothing. say: called with lines for people while a comparison that is not cached runs.

    Raises UsageError for ``gigatoken`` where it is missing, cannot load the model, or differs.
    """
    if mode == "reference":
        return Choice("reference", "asked for")
    choice = _try_gigatoken(tokenizer, list(sample), say)
    if mode == "gigatoken" and choice.engine != "gigatoken":
        raise UsageError(f"--tokenizer-engine gigatoken: {choice.reason}; use --tokenizer-engine reference")
    return choice


class Engine:
    """Encoder by the engine that was chosen, in bounded memory.

    load_reference: called once, and only when a text needs the reference engine, which takes a while to load.
    max_resident_bytes: bound on the memory of this process. gigatoken remembers every word that it has seen, 9 bytes of
    memory for each byte of new text; above the bound the engine is loaded afresh. 0: no bound.
    turns: file that the processes of a run lock in turn, so that only one of them encodes a very long text at a time.
    """

    def __init__(
        self,
        tokenizer_type: TokenizerType,
        tokenizer_model: str | Path | None,
        choice: Choice,
        load_reference: Callable[[], Tokenizer],
        *,
        max_resident_bytes: int = 0,
        turns: Path | None = None,
    ) -> None:
        self._type, self._model = tokenizer_type, tokenizer_model
        self._load_reference = load_reference
        self._limit = max_resident_bytes
        self._turns = turns
        self._fast: Any = _load_gigatoken(tokenizer_type, tokenizer_model) if choice.engine == "gigatoken" else None
        self._routes = Routes(choice.code_points, choice.routed)

    @cached_property
    def _reference(self) -> Tokenizer:
        return self._load_reference()

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """Encode texts as ids that lie one after the other: those of the reference engine. Raises UnencodableError."""
        arrays = self.encode_arrays(texts)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return Ragged(tokens, np.array([len(array) for array in arrays], dtype=np.int32))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """Encode each text as an array of ids, those of the reference engine. Raises UnencodableError."""
        if self._fast is None:
            return self._reference.encode_arrays(texts)
        arrays: list[NDArray[np.integer[Any]]] = []
        for text in texts:
            if self._routes.holds_any(text):
                arrays.append(np.array(self._reference.encode(text), dtype=np.uint32))
                continue
            large = self._limit > 0 and len(text) > _LARGE_BYTES // 4 and len(text.encode()) > _LARGE_BYTES
            arrays.append(self._encode_large(text) if large else self._fast.encode(text))
        self._forget_if_large()
        return arrays

    def _encode_large(self, text: str) -> NDArray[np.integer[Any]]:
        with contextlib.ExitStack() as stack:
            if self._turns is not None:
                # One text at a time over all processes: each may take a hundred megabytes for a moment.
                lock_stream(stack.enter_context(open_to_lock(self._turns)), self._turns, wait=True)
            if _resident_bytes() > self._limit // 2:
                self._reload()
            ids: NDArray[np.integer[Any]] = self._fast.encode(text)
            self._forget_if_large()
        return ids

    def _forget_if_large(self) -> None:
        if self._limit and _resident_bytes() > self._limit:
            self._reload()
            # Where the engine alone is that large, loading it again and again would not help.
            self._limit = max(self._limit, _resident_bytes() + (64 << 20))

    def _reload(self) -> None:
        self._fast = None
        give_back_memory()
        self._fast = _load_gigatoken(self._type, self._model)


def give_back_memory() -> None:
    """Return the allocator's free pages to the system, where the C library can do so."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: the pages stay for this process to use again


def _try_gigatoken(tokenizer: Tokenizer, sample: Sequence[str], say: Callable[[str], object]) -> Choice:
    try:
        fast = _load_gigatoken(tokenizer.type, tokenizer.path)
        if fast is None or tokenizer.path is None:
            return Choice("reference", f"{tokenizer.type} needs no fast engine")
        engines = EnginePair(tokenizer.encode_arrays, fast.encode)
        code_points = _scan(tokenizer, engines, say)
    except ImportError:
        return Choice("reference", "the package gigatoken is not installed")
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        return Choice("reference", f"gigatoken cannot load this model: {' '.join(str(error).split())[:200]}")
    routed = tuple(literal for literal in tokenizer.literals if literal not in tokenizer.white_literals)
    guises = normalised_guises(set(tokenizer.normalised_literals).intersection(routed))
    ranges = (*((first, last) for first, last in code_points), *((point, point) for point in sorted(guises)))
    routes = Routes(ranges, routed)
    known = remember(
        "engines-compared",
        _versions() | {"tokenizer": tokenizer.hash, "code_points": ranges, "routed": routed},
        lambda: _compare(tokenizer, engines, routes),
    )
    fast_texts = [text for text in sample if not routes.holds_any(text)]
    differing = known["differing"] + [text[:80] for text in engines.differing(fast_texts)]
    if differing:
        return Choice("reference", f"gigatoken differs on {len(differing)} texts, the first is {differing[0]!r}")
    sizes = sum(map(len, sample)), sum(map(len, fast_texts))
    if sizes[0] > 2 * sizes[1]:
        share = f"{1 - sizes[1] / sizes[0]:.0%}"
        return Choice("reference", f"{share} of the sample holds what only the reference engine is trusted with")
    reason = f"equal ids on {known['num_texts']} hostile strings, the vocabulary and the corpus sample"
    if routed or ranges:
        num_points = sum(last - first + 1 for first, last in ranges)
        reason += f"; documents with one of {num_points} code points or {len(routed)} literals go to the reference"
    return Choice("gigatoken", reason, routed, ranges)


def _scan(tokenizer: Tokenizer, engines: EnginePair, say: Callable[[str], object]) -> list[list[int]]:
    """Code points beside which the engines differ; a byte-level BPE tokenizer is replaced by its probe.

    The result is cached for the tokenizer, and for the probe, which tokenizers of one family share.
    """

    def scan(scanned: str, engines: EnginePair) -> list[list[int]]:
        progress = _ScanProgress(say)
        ranges: list[list[int]] = remember(
            "engines-scanned",
            _versions() | {"probe": scanned, "blocks": _scanned_blocks()},
            lambda: scan_code_points(engines, normalises=tokenizer.normalises, report=progress),
        )
        return ranges

    def scan_with_probe() -> list[list[int]]:
        probe = build_probe(tokenizer.content) if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if probe is None:
            return scan(tokenizer.hash, engines)
        pair = EnginePair(partial(encode_with, load_engine(probe)), _load_bytes(tokenizer.type, probe).encode)
        return scan(xxhash.xxh3_128_hexdigest(probe), pair)

    key = {"tokenizer": tokenizer.hash, "blocks": _scanned_blocks()}
    ranges: list[list[int]] = remember("engines-scanned", _versions() | key, scan_with_probe)
    return ranges


def _scanned_blocks() -> list[list[int]]:
    return [[block.start, block.stop] for block in engine_scan.SCANNED]


def _compare(tokenizer: Tokenizer, engines: EnginePair, routes: Routes) -> dict[str, Any]:
    """Compare the engines on texts that are not routed: the number of hostile texts, and the texts that differ, cut."""
    hostile = hostile_texts(tokenizer.literals) + random_texts()
    texts = [text for text in hostile + vocabulary_texts(tokenizer) if not routes.holds_any(text)]
    return {"num_texts": len(hostile), "differing": [text[:80] for text in engines.differing(texts)[:1000]]}


def _load_gigatoken(tokenizer_type: TokenizerType, tokenizer_model: str | Path | None) -> Any:
    """Load gigatoken's engine for a model; None for a type without a model.

    The model is passed as bytes: given a path that does not exist, gigatoken would look for it on the network.
    """
    file = model_file(tokenizer_type, tokenizer_model)
    return None if file is None else _load_bytes(tokenizer_type, file.read_bytes())


def _load_bytes(tokenizer_type: TokenizerType, content: bytes) -> Any:
    import gigatoken

    if tokenizer_type == "SentencePieceTokenizer":
        return gigatoken.Tokenizer.from_sentencepiece(content)
    return gigatoken.Tokenizer.from_json(without_dropout(content))


def _versions() -> dict[str, Any]:
    """Versions on which a comparison depends: its own, Unicode's and the engines'."""
    versions: dict[str, Any] = {"comparison": _COMPARISON_VERSION, "unicode": unicodedata.unidata_version}
    for package in _ENGINES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


class _ScanProgress:
    """Says how far a scan has come: when it begins, every few seconds, and when it ends."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._progress: Progress | None = None

    def __call__(self, fraction: float) -> None:
        if self._progress is None:
            self._progress = Progress(1.0, done=0.0, interval=_PROGRESS_SECONDS)
            self._say("comparing both tokenizer engines over all of Unicode, once for this tokenizer")
        elif fraction == 1.0:
            self._say(f"compared both tokenizer engines in {self._progress.seconds:.0f} s")
        elif self._progress.is_due():
            self._say(f"comparing both tokenizer engines: {fraction:.0%}")


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system has no /proc, which switches the bound off."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
