"""Text of a continuation, as far as it is certain, while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.data.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def text_behind(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of ``ids`` behind a prompt.

    It is what the prompt's text gains: a sentencepiece tokenizer drops the space before a text's first word, and a
    character may begin in one token and end in the next.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


class TextStream:
    """Pieces of a continuation's text, one after each token; a character that is not whole yet waits for its end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._shown = ""

    def piece(self, ids: Sequence[int], *, ended: bool = False) -> str:
        """Return what is new in the text of ``ids``. ended: no token follows."""
        text = text_behind(self._tokenizer, self._prompt, ids)
        certain = text if ended else text.rstrip(_UNFINISHED)
        if not certain.startswith(self._shown):
            return ""  # what was shown cannot be taken back; the whole text is in --output
        piece, self._shown = certain[len(self._shown) :], certain
        return piece
