"""Texts about which implementations of a tokenizer disagree: collected, random, and made from the vocabulary."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

from megakd.data.tokenizers.base import Tokenizer

# Characters of every kind that a pre-tokenizer, a normaliser or a contraction tells apart.
# fmt: off
_KINDS = (
    " ", " ", "  ", "\x0a", "\x0d\x0a", "\x09", "\xa0", "\x85", "\u2028", "\u3000", "\u180e", "\u200b", "\ufeff",
    "a", "b", "st", "The", "A", "Q", "\u01c5", "\u02b0", "\xe9", "\xdf", "\u0130", "\u017f", "\u212a", "\u4e2d",
    "\u3042", "\u30ab", "1", "12", "345", "\u0663", "\xb2", "\u2167", "\u0be7", "\U0001d7d8", "'", "'s", "'S",
    "'\u017f", "'ll", "'RE", "\u2019t", ".", ",", "-", "_", "<", ">", "/", "|", "$", "+", "\u2014", "\u20ac",
    "\xab", "\u0301", "\u0327", "\u0323", "\u0345", "\u064b", "\u0651", "\u05b0", "\u0940", "\u094d", "\u093c",
    "\u0e33", "\u1100", "\u1161", "\u11a8", "\uac00", "\u200d", "\ufe0f", "\U0001f469", "\U0001f3fd", "\U0001f1e9",
    "\U000e0061", "\xad", "\x00", "\x1b", "\x7f", "\ufffd", "\ue000", "\ufdd0",
)
# fmt: on
_NUM_RANDOM = 6000
_PIECES_PER_TEXT = 8


def hostile_texts(literals: Sequence[str]) -> list[str]:
    """Collect strings about which implementations disagree; each of ``literals``, control tokens, in several guises."""
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
    # Letters and digits that are new in Unicode: engines carry tables of different ages.
    recent = (
        "\U00010ec2\U00016a40\U0001e030\U0001f7f0\U00011f04\U00031350\U0002ebf0\U000105c0\U00010d4a"
        "\U0001e5d0\U00016d70\u1c89\ua7cb\U0001ccf0\U00010940\U00011db0\U00016ea0\ua7ce"
        "\U0001fae9\U00016120\U000113d1\u2ffc\U0001e4d0\u0c5d\u0870\U0001df25\U000323b0"
    )
    texts += [f"a{letter}b 1{letter}2 ,{letter}{letter} {letter}" for letter in recent]
    for literal in literals:
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
            unicodedata.normalize("NFD", literal),
        ]
        texts += [
            literal[:2] + gap + literal[2:] for gap in (" ", "\u200b", "\u00ad", "\ufeff", "\x00", "\x7f", "\u0301")
        ]
    return texts


def random_texts() -> list[str]:
    """Make short random texts of characters of every kind, runs of white space, and every pair of ASCII characters."""
    source = random.Random(0)
    texts = ["".join(source.choices(_KINDS, k=source.randint(2, 12))) for _ in range(_NUM_RANDOM)]
    runs = [space * length for space in (" ", "\n", "\t", "\r\n", " \n", "\n ") for length in range(1, 81)]
    texts += [f"a{run}b{run}{run}1{run}<" for run in runs] + runs
    letters = [chr(code) for code in range(0x80)]
    texts += ["".join(f"{first}{second}a{first}{second}1 " for second in letters) for first in letters]
    return texts


def vocabulary_texts(tokenizer: Tokenizer) -> list[str]:
    """Decode every id, shuffled, and join several to a text."""
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    random.Random(0).shuffle(pieces)
    return ["".join(pieces[start : start + _PIECES_PER_TEXT]) for start in range(0, len(pieces), _PIECES_PER_TEXT)]
