"""Routes: texts that only the reference engine may encode, as they hold one of some code points or literals.

Every document is searched, which has to cost little beside the fast engine. Each code point and each literal begins
with two bytes of UTF-8, and few texts hold one of those pairs: a native search finds them, and only they are looked at
more closely.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megakd._csrc import BytePairs

_LITERAL_BYTES = 32  # longer literals are searched by their beginnings: few other texts hold one
_SPACES = " \u2581"  # sentencepiece's normalisers turn a space into U+2581 and back
_CHUNK_CHARACTERS = 1 << 18
_NOTHING = re.compile(b"(?!)")


class Routes:
    """Finds the texts that hold a code point of the ``[first, last]`` ranges, or one of the literals.

    literals: any number of them. A space in one stands for U+2581 as well, and the other way round.
    """

    def __init__(self, code_points: Sequence[Sequence[int]], literals: Sequence[str]) -> None:
        self._is_routed = np.zeros(0x110000, dtype=np.bool_)
        for first, last in code_points:
            self._is_routed[first : last + 1] = True
        words = {guise.encode(errors="surrogatepass")[:_LITERAL_BYTES] for word in literals for guise in _guises(word)}
        words.discard(b"")
        self._literals = re.compile(_alternation(words)) if words else _NOTHING
        pairs = np.zeros((256, 256), dtype=np.uint8)
        starts = words | {_first_bytes(point) for first, last in code_points for point in _corners(first, last)}
        for start in starts:
            pairs[start[0], start[1] if len(start) > 1 else slice(None)] = 1
        self._pairs = BytePairs(pairs.reshape(-1)) if starts else None
        self._single = {start for start in starts if len(start) == 1}

    def holds_any(self, text: str) -> bool:
        """Return whether the text holds a code point or a literal, and must go to the reference engine."""
        data = text.encode(errors="surrogatepass")
        if self._pairs is None or not (self._pairs.found_in(data) or data[-1:] in self._single):
            return False
        if self._literals.search(data):
            return True
        pieces = (text[start : start + _CHUNK_CHARACTERS] for start in range(0, len(text), _CHUNK_CHARACTERS))
        return any(self._is_routed[np.frombuffer(_as_utf32(piece), dtype="<u4")].any() for piece in pieces)


def normalised_guises(literals: Iterable[str]) -> set[int]:
    """Code points that a text must hold if canonical composition turns a part of it into a literal.

    Such a part holds a character that the literal does not: one that is composed away, or that is replaced by another.
    """
    decomposed = {literal: unicodedata.normalize("NFD", literal) for literal in literals}
    points = {ord(char) for literal, letters in decomposed.items() for char in letters if char not in literal}
    letters = set().union(*decomposed.values()) if decomposed else set()
    for point in itertools.chain(range(0x80, 0xD800), range(0xF900, 0x10000), range(0x11000, 0x30000)):
        character = chr(point)
        stays = not unicodedata.decomposition(character) or unicodedata.normalize("NFC", character) == character
        if not stays and not letters.isdisjoint(unicodedata.normalize("NFD", character)):
            points.add(point)
    return {point for point in points if point >= 0x80}


def _as_utf32(text: str) -> bytes:
    return text.encode("utf-32-le", errors="surrogatepass")


def _first_bytes(point: int) -> bytes:
    return chr(point).encode(errors="surrogatepass")[:2]


def _corners(first: int, last: int) -> Iterable[int]:
    """Code points of a range that have, between them, all beginnings of two bytes that its characters have in UTF-8.

    From U+0800 on, 64 neighbours share a beginning.
    """
    return {last, *range(first, last, 0x40), *range(first, min(last, 0x7FF))}


def _guises(literal: str) -> Iterable[str]:
    """Spellings of a literal, each space as U+0020 or U+2581; it is cut before its fourth space."""
    parts = re.split(f"[{_SPACES}]", literal)[:4]
    for gaps in itertools.product(_SPACES, repeat=len(parts) - 1):
        yield "".join(itertools.chain.from_iterable(zip(("", *gaps), parts)))


def _alternation(words: Iterable[bytes]) -> bytes:
    """Pattern that matches where any of the words begins: a tree that branches where the words do."""
    tree: dict[int, Any] = {}
    for word in sorted(words, key=len):
        node = tree
        for byte in word:
            if byte in node and not node[byte]:
                break  # a shorter word ends there, and is found
            node = node.setdefault(byte, {})
    return _branches(tree)


def _branches(tree: dict[int, Any]) -> bytes:
    branches = [re.escape(bytes([byte])) + _branches(following) for byte, following in sorted(tree.items())]
    if len(branches) <= 1:
        return b"".join(branches)
    return b"(?:" + b"|".join(branches) + b")"
