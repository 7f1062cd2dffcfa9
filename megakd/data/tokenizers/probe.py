"""The probe: a byte-level BPE tokenizer that cuts texts like another one, and whose ids show every cut.

Two engines that cut a text at different places often give the same ids nevertheless, because few vocabularies join the
bytes on either side of that place. The probe has the normaliser and pre-tokenizer of the tokenizer that is probed, and
a vocabulary of its own: the 256 bytes, and every pair of bytes that can stand where one character ends and the next
begins. Where a text is not cut, the two bytes are joined; so engines that agree on the probe's ids cut and normalise
alike.
"""

from __future__ import annotations

import json
from typing import Any

_ASCII = (*b"\t\n\r", *range(0x20, 0x7F))
_FIRST = range(0xC2, 0xF5)  # of a character of two to four bytes in UTF-8
_LAST = range(0x80, 0xC0)


def build_probe(content: bytes) -> bytes | None:
    """Make a tokenizer.json that probes the tokenizer.json ``content``; None where that is no byte-level BPE.

    Raises ValueError for content that is no JSON.
    """
    tokenizer: dict[str, Any] = json.loads(content)
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        return None
    if '"ByteLevel"' not in json.dumps(tokenizer.get("pre_tokenizer")):
        return None
    letters = _byte_letters()
    pairs = [(last, following) for last in _LAST for following in (*_ASCII, *_FIRST)]
    pairs += [(before, first) for before in _ASCII for first in (*_FIRST, *_ASCII)]
    merges = [[letters[first], letters[second]] for first, second in pairs]
    vocabulary = [*letters, *("".join(merge) for merge in merges)]
    bare = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "unk_token": None, "dropout": None}
    model = {**model, **bare, "vocab": {piece: i for i, piece in enumerate(vocabulary)}, "merges": merges}
    plain: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return json.dumps({**tokenizer, **plain, "model": model}).encode()


def _byte_letters() -> list[str]:
    """Characters that byte-level BPE writes for the 256 bytes: itself if printable, else one from U+0100 on."""
    letters, spare = [], 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters
