"""The fast engine behind its parity gate: ids that are the reference engine's, several times as fast, or not at all.

`gigatoken` reimplements byte-level and sentencepiece BPE. Before it is used for a tokenizer, both engines encode a
sample of the corpus and a list of hostile strings. One id that differs, and the reference engine does the work. The
one exception is a difference confined to texts with a control token written out (``</s>``), which are easily found:
those documents alone go to the reference engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megakd.data.tokenizer import Ragged, Tokenizer, TokenizerType, model_file
from megakd.errors import UsageError

EngineMode = Literal["auto", "reference", "gigatoken"]

_MAX_LITERALS = 64  # each is searched for in every document
_LARGE_BYTES = 2 << 20  # of one text; an unusual one takes gigatoken some 35 bytes of memory a byte


@dataclass(frozen=True)
class Choice:
    """Which engine encodes, and why: printed, and recorded in the manifest."""

    engine: Literal["reference", "gigatoken"]
    reason: str
    routed: tuple[str, ...] = ()
    """Texts that send the document they stand in to the reference engine."""

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for `from_dict` and the manifest."""
        return {**asdict(self), "routed": list(self.routed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `as_dict`."""
        return cls(data["engine"], data["reason"], tuple(data["routed"]))


def choose_engine(tokenizer: Tokenizer, sample: Iterable[str], *, mode: EngineMode = "auto") -> Choice:
    """Hold the fast engine against the reference engine on a sample of the corpus and on hostile strings.

    mode: ``auto`` uses the fast engine where it passes, ``gigatoken`` makes it an error if it does not.

    Raises UsageError for ``gigatoken`` where it is missing, cannot load the model, or differs.
    """
    if mode == "reference":
        return Choice("reference", "asked for")
    choice = _try_gigatoken(tokenizer, sample)
    if mode == "gigatoken" and choice.engine != "gigatoken":
        raise UsageError(f"--tokenizer-engine gigatoken: {choice.reason}; use --tokenizer-engine reference")
    return choice


class Engine:
    """Encodes batches with the engine that was chosen; bounded in memory by ``max_resident_bytes``.

    load_reference: called once, and only when the reference engine has something to do: loading it takes a while.
    max_resident_bytes: of this process. gigatoken remembers every word it has seen, 9 bytes of memory a byte of unseen
    text; above this size the engine is loaded afresh. 0: no bound.
    turns: a file that the processes of a run lock in turn, to have one very long text in memory among them all.
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
        self._choice = choice
        self._load_reference = load_reference
        self._limit = max_resident_bytes
        self._turns = turns
        self._fast: Any = _load_gigatoken(tokenizer_type, tokenizer_model) if choice.engine == "gigatoken" else None

    @cached_property
    def _reference(self) -> Tokenizer:
        return self._load_reference()

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """The ids of each text, one after the other: the reference engine's ids. Raises UnencodableError."""
        arrays = self.encode_arrays(texts)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return Ragged(tokens, np.array([len(array) for array in arrays], dtype=np.int32))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """The ids of each text, one array a text. Raises UnencodableError."""
        if self._fast is None:
            return self._reference.encode_arrays(texts)
        arrays: list[NDArray[np.integer[Any]]] = []
        for text in texts:
            if any(literal in text for literal in self._choice.routed):
                arrays.append(np.array(self._reference.encode(text), dtype=np.uint32))
                continue
            large = self._limit > 0 and len(text) > _LARGE_BYTES // 4 and len(text.encode()) > _LARGE_BYTES
            arrays.append(self._encode_large(text) if large else self._fast.encode(text))
        self._forget_if_large()
        return arrays

    def _encode_large(self, text: str) -> NDArray[np.integer[Any]]:
        with contextlib.ExitStack() as stack:
            if self._turns is not None:
                # One at a time over all processes: each may take a hundred megabytes for a moment.
                fcntl.flock(stack.enter_context(open(self._turns, "ab")), fcntl.LOCK_EX)
            if _resident_bytes() > self._limit // 2:
                self._reload()
            ids: NDArray[np.integer[Any]] = self._fast.encode(text)
            self._forget_if_large()
        return ids

    def _forget_if_large(self) -> None:
        if self._limit and _resident_bytes() > self._limit:
            self._reload()
            # Where the engine alone is that large, loading it again and again would help nobody.
            self._limit = max(self._limit, _resident_bytes() + (64 << 20))

    def _reload(self) -> None:
        self._fast = None
        give_back_memory()
        self._fast = _load_gigatoken(self._type, self._model)


def hostile_texts(literals: Sequence[str]) -> list[str]:
    """Strings that implementations disagree about; each control token of ``literals`` in several guises."""
    texts = [
        "",
        " ",
        "  a  b  ",
        "\n",
        "\r\n\r\n\n\r",
        "\t\t \t",
        " " * 700,
        "\n" * 300,
        "a" * 2000,
        "ab " * 500,
        "\x00",
        "a\x00b",
        "".join(map(chr, range(1, 32))),
        "\x7f\x80\x85\x9f\xa0",
        "e\u0301\u0327\u0301 \u0301a",
        "\u1e9b\u0323 \ufb01 \u2460 \uff21",
        "\u05e9\u05dc\u05d5\u05dd \u202bab\u202c \u0645\u0631\u062d\u0628\u0627 \u0661\u0662",
        "\u0915\u094d\u0937 \u0e01\u0e33\u0e49",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
        "\U0001f3f4\U000e0067\U000e007f \u2764\ufe0f \U0001f1e9\U0001f1ea",
        "\ud7ff\ue000\ufffd\ufffe\uffff\U00010000\U0010ffff",
        "\ufeffa\ufeff",
        "\u200b\u200c\u200d\u2060\u00ad",
        "\u2028\u2029\u3000\u1680 x",
        "I'M we'Re DON'T 'S'll ' s",
        "1234567 12,345.67 \u0661\u0662\u0663\u00bd\u2167\u00b2",
        "\u2581a \u2581\u2581 b\u2581",
        "<0x41><0x0A> <unk>",
        "\u4e2d\u6587\u5206\u8bcd\uff0c\u3072\u3089\u30ab\u30ca \ud55c\uad6d\uc5b4",
        "!!!???...---===___***",
        "\u212b\u017f\u0130\u0131\u00df\u1e9e \u01c5",
        "def f(x):\r\n\treturn  x  # \u2713\r\n",
        "\u0102\u0103 \U00020000\U0003134a",
        "http://a.b/c?d=e&f=%20#g",
        "A" * 40 + "b" * 40 + "1" * 40,
    ]
    # Letters and digits that Unicode gained lately: engines carry tables of different ages.
    recent = (
        "\U00010ec2\U00016a40\U0001e030\U0001f7f0\U00011f04\U00031350\U0002ebf0\U000105c0\U00010d4a"
        "\U0001e5d0\U00016d70\u1c89\ua7cb\U0001ccf0\U00010940\U00011db0\U00016ea0\ua7ce"
        "\U0001fae9\U00016120\U000113d1\u2ffc\U0001e4d0\u0c5d\u0870\U0001df25\U000323b0"
    )
    texts += [f"a{letter}b 1{letter}2 ,{letter}{letter} {letter}" for letter in recent]
    for literal in literals[:_MAX_LITERALS]:
        wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in literal)
        texts += [
            literal,
            f"a{literal}b",
            f" {literal} ",
            f"{literal}{literal}\n",
            literal.upper(),
            literal[:-1],
            wide,
            f"a{wide} b",
        ]
        texts += [
            literal[:2] + gap + literal[2:] for gap in (" ", "\u200b", "\u00ad", "\ufeff", "\x00", "\x7f", "\u0301")
        ]
    return texts


def give_back_memory() -> None:
    """Return the allocator's free pages to the system, where the C library can."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: the pages stay for this process to use again


def _try_gigatoken(tokenizer: Tokenizer, sample: Iterable[str]) -> Choice:
    try:
        fast = _load_gigatoken(tokenizer.type, tokenizer.path)
    except ImportError:
        return Choice("reference", "the package gigatoken is not installed")
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        return Choice("reference", f"gigatoken cannot load this model: {' '.join(str(error).split())[:200]}")
    if fast is None:
        return Choice("reference", f"{tokenizer.type} needs no fast engine")
    sample = list(sample)
    texts = hostile_texts(tokenizer.literals) + sample
    differing = [
        text
        for text, ids in zip(texts, tokenizer.encode_arrays(texts))
        if not np.array_equal(np.asarray(fast.encode(text)), ids)
    ]
    if not differing:
        return Choice("gigatoken", f"equal ids on {len(texts) - len(sample)} hostile strings and the corpus sample")
    outside = [text for text in differing if not any(literal in text for literal in tokenizer.literals)]
    if outside or len(tokenizer.literals) > _MAX_LITERALS:
        first = (outside or differing)[0]
        return Choice("reference", f"gigatoken differs on {len(differing)} texts, the first is {first[:80]!r}")
    return Choice(
        "gigatoken",
        f"equal ids except where a control token is written out, first in {differing[0][:80]!r}",
        routed=tokenizer.literals,
    )


def _load_gigatoken(tokenizer_type: TokenizerType, tokenizer_model: str | Path | None) -> Any:
    """gigatoken's engine for a model, None for a type it has none for.

    Loaded from bytes: given a path that does not exist, gigatoken would look for it on the network.
    """
    file = model_file(tokenizer_type, tokenizer_model)
    if file is None:
        return None
    import gigatoken

    if tokenizer_type == "SentencePieceTokenizer":
        return gigatoken.Tokenizer.from_sentencepiece(file.read_bytes())
    return gigatoken.Tokenizer.from_json(file.read_bytes())


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system has no /proc, which switches the bound off."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
