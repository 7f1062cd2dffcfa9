"""Scan of all of Unicode for characters about which two engines of one tokenizer differ.

Engines carry tables of Unicode of different ages. A character that only one of them knows as a letter, or a mark that
only one of them puts in canonical order, changes ids beside some characters and not beside others. So every code point
is written between letters, digits, spaces, line ends, punctuation and marks, and both engines encode that: in runs
first, which costs seconds for all planes, and one by one where a run differs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]

SCANNED = (range(0x80, 0xD800), range(0xE000, 0x110000))
"""Scanned code points: all but ASCII, of which `hostile_texts` is full."""
# Where characters of many kinds stand side by side. Elsewhere are ideographs, Hangul, private use, or nothing.
_DENSE = (
    range(0x80, 0x3400),
    range(0x4DC0, 0x4E00),
    range(0xA000, 0xAC00),
    range(0xD780, 0xD800),
    range(0xF900, 0x17000),
    range(0x18B00, 0x20000),
    range(0xE0000, 0xE1000),
)
_BLOCK, _RUN = 64, 16
_BATCH_TEXTS = 256
# Doubled neighbours show both cuts at once; single ones are taken along by a rule such as ``[^\r\n\p{L}\p{N}]?\p{L}+``.
_FRAMES = (
    "aa{0}AA{0}11{0}<<{0}  {0}\n\n{0}{0}{0}{0}a",
    "a{0}A<{0}a '{0}'s",
    "\u0301{0}\u0301\u4e2d{0}\u4e2d",
)
# Canonical order moves a mark before U+0345 (class 240, the highest) or behind U+0334 (class 1, the lowest).
_ORDER_FRAMES = ("a\u0345{0}\u0334", "\u0628\u0650{0}\u0650")
_EDGES = ("a", "1", "<", " ", "A", "\n", "\u0301", "\u4e2d")
# Canonical compositions of Unicode 15 to 17, which Python's own tables may not have yet: composite, first, second.
_RECENT_COMPOSITIONS = (
    (0x105C9, 0x105D2, 0x0307),
    (0x105E4, 0x105DA, 0x0307),
    (0x11383, 0x11382, 0x113C9),
    (0x11385, 0x11384, 0x113BB),
    (0x1138E, 0x1138B, 0x113C2),
    (0x11391, 0x11390, 0x113C9),
    (0x113C5, 0x113C2, 0x113C2),
    (0x113C7, 0x113C2, 0x113B8),
    (0x113C8, 0x113C2, 0x113C9),
    (0x16121, 0x1611E, 0x1611E),
    (0x16122, 0x1611E, 0x16129),
    (0x16123, 0x1611E, 0x1611F),
    (0x16124, 0x16129, 0x1611F),
    (0x16125, 0x1611E, 0x16120),
    (0x16126, 0x16121, 0x1611F),
    (0x16127, 0x16122, 0x1611F),
    (0x16128, 0x16121, 0x16120),
    (0x16D68, 0x16D67, 0x16D67),
    (0x16D69, 0x16D63, 0x16D67),
    (0x16D6A, 0x16D69, 0x16D67),
)


@dataclass(frozen=True)
class EnginePair:
    """Two engines of the same tokenizer, each a function from text to ids."""

    reference: Callable[[Sequence[str]], Sequence[Ids]]
    fast: Callable[[str], Ids]

    def differing(self, texts: Sequence[str]) -> list[str]:
        """Texts to which the two give different ids."""
        return [
            text
            for text, ids in zip(texts, self.reference(texts))
            if not np.array_equal(np.asarray(self.fast(text)), ids)
        ]


def scan_code_points(engines: EnginePair, *, normalises: bool, report: Callable[[float], object]) -> list[list[int]]:
    """Find code points beside which the engines may differ, as sorted ``[first, last]`` ranges.

    normalises: True if the tokenizer rewrites text before it cuts it, so that canonical orders and compositions are
    compared, too. report: called with the fraction that is done.
    """
    frames = _FRAMES + _ORDER_FRAMES if normalises else _FRAMES
    blocks = [block for scanned in SCANNED for block in _chunks(scanned, _BLOCK)]
    differing: set[int] = set()
    for done in range(0, len(blocks), _BATCH_TEXTS):
        report(done / len(blocks))
        batch = {_block_text(block, frames): block for block in blocks[done : done + _BATCH_TEXTS]}
        for text in engines.differing(list(batch)):
            differing.update(_differing_in(engines, batch[text], frames))
    if normalises:
        _add_differing_sequences(engines, differing)
    report(1.0)
    return _ranges(differing)


def _differing_in(engines: EnginePair, block: Sequence[int], frames: Sequence[str]) -> set[int]:
    """Code points that explain why a block differs; the whole block where they do not explain it."""
    texts = {frame.format(chr(point)): point for point in block for frame in frames}
    differing = {texts[text] for text in engines.differing(list(texts))}
    rest = [point for point in block if point not in differing]
    return set(block) if rest and engines.differing([_block_text(rest, frames)]) else differing


def _add_differing_sequences(engines: EnginePair, known: set[int]) -> None:
    """Add code points to ``known`` that show every composition, and every order of two marks, on which engines differ.

    A composition or an order that only one engine knows has a character that the other does not know, as Unicode never
    changes the properties of old characters. The newer of two characters is taken to be the one of the larger number.
    The composite is added, too: taken apart, its first part may compose with the character before it.
    """
    texts: dict[str, set[int]] = {}
    for composite, first, second in _compositions():
        pair = chr(first) + chr(second)
        texts[f"{pair}a {pair}\u0323"] = {composite, *({max(first, second)} if not known & {first, second} else ())}
    marks = [point for scanned in SCANNED for point in scanned if unicodedata.combining(chr(point))]
    ladder = {unicodedata.combining(chr(point)): point for point in marks if point not in known}
    steps = "".join(chr(ladder[order]) for order in sorted(ladder))
    texts.update({f"a{chr(point)}{steps}": {point} for point in marks if point not in known})
    batch = list(texts)
    for start in range(0, len(batch), 64 * _BATCH_TEXTS):
        for text in engines.differing(batch[start : start + 64 * _BATCH_TEXTS]):
            known.update(texts[text])


def _compositions() -> Iterator[tuple[int, int, int]]:
    """Scanned characters that decompose into two, Hangul syllables included: composite, first, second."""
    for scanned in SCANNED:
        for point in scanned:
            parts = unicodedata.decomposition(chr(point)).split()
            if len(parts) == 2 and not parts[0].startswith("<"):
                yield point, int(parts[0], 16), int(parts[1], 16)
            elif 0xAC00 <= point <= 0xD7A3:
                syllable, tail = divmod(point - 0xAC00, 28)
                lead, vowel = divmod(syllable, 21)
                if tail:
                    yield point, point - tail, 0x11A7 + tail
                else:
                    yield point, 0x1100 + lead, 0x1161 + vowel
    yield from (known for known in _RECENT_COMPOSITIONS if any(known[0] in scanned for scanned in SCANNED))


def _block_text(block: Sequence[int], frames: Sequence[str]) -> str:
    """Text with all code points of a block: in runs, and in blocks of mixed kinds each alone in every frame."""
    texts = []
    for number, run in enumerate(_chunks(block, _RUN)):
        edge = _EDGES[(block[0] // _BLOCK + number) % len(_EDGES)]
        characters = "".join(map(chr, run))
        texts += [edge, characters, "aa", characters, "<<"]  # letters go with what is before, the others with "<<"
    if any(block[0] in dense for dense in _DENSE):
        texts += [frame.format(chr(point)) for point in block for frame in frames]
    return "".join(texts)


def _chunks(points: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (points[start : start + size] for start in range(0, len(points), size))


def _ranges(points: Iterable[int]) -> list[list[int]]:
    """Sorted ``[first, last]`` ranges of a set of code points."""
    ranges: list[list[int]] = []
    for point in sorted(points):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return ranges
