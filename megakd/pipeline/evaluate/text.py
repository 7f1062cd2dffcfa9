"""Contexts and continuations as token ids, by the rules of lm-eval's ``hf`` back-end."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.data.tokenizer import Tokenizer
from megakd.errors import UsageError


@dataclass(frozen=True)
class TextCodec:
    """A model's tokenizer as the harness uses it.

    add_bos_token: True puts the begin-of-text token before every context, False never; None leaves it to the
    tokenizer's own template. prefix_token: id that stands for an empty context.
    """

    tokenizer: Tokenizer
    add_bos_token: bool | None
    prefix_token: int
    prefix_text: str

    @staticmethod
    def of(tokenizer: Tokenizer, *, add_bos_token: bool | None, prefix_token_id: int | None) -> TextCodec:
        """Make the codec; the prefix token is the given one, else begin of text, else end of document.

        Raises UsageError where there is none, or where a begin-of-text token is asked for that the files do not name.
        """
        ids = (prefix_token_id, tokenizer.bos, tokenizer.eod)
        prefix = next((i for i in ids if i is not None), None)
        if prefix is None or prefix >= tokenizer.vocab_size:
            raise UsageError(
                f"--prefix-token-id {prefix}: the tokenizer {tokenizer.path or tokenizer.type} has "
                f"{tokenizer.vocab_size} ids; give the one that stands before a text without context"
            )
        if add_bos_token and tokenizer.bos is None:
            raise UsageError(
                f"--add-bos-token: the files of the tokenizer {tokenizer.path or tokenizer.type} name no bos_token"
            )
        return TextCodec(tokenizer, add_bos_token, prefix, tokenizer.text_of(prefix))

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Encode a text; add_special_tokens: None for what the codec was made for, unless the text begins so itself."""
        if add_special_tokens is None:
            begins = bool(self.prefix_text) and text.startswith(self.prefix_text)
            add_special_tokens = False if begins else self.add_bos_token
        if add_special_tokens is None:
            return self.tokenizer.encode_in_template(text)
        if not add_special_tokens:
            return self.tokenizer.encode(text)
        inside = self.tokenizer.encode_in_template(text)
        bos = self.tokenizer.bos
        return inside if bos is None or inside[:1] == [bos] else [bos, *inside]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation, which is cut from the ids of both together.

        Blanks at the end of the context belong to the continuation. An empty context is the prefix token.
        """
        if not context:
            ids = self.encode(continuation, add_special_tokens=False)
            return ([self.prefix_token], ids) if ids[:1] != [self.prefix_token] else (ids[:1], ids[1:])
        blanks = len(context) - len(context.rstrip())
        if blanks:
            continuation, context = context[-blanks:] + continuation, context[:-blanks]
        whole, first = self.encode(context + continuation), self.encode(context)
        return first, whole[len(first) :]
