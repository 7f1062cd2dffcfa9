"""A teacher without a model, for benchmarks: an interpolated trigram model of the Python sources on this machine.

Its rows have what rows of a trained teacher have and random ones do not: ids by Zipf's law, sets of likely ids that
depend on the context, heads and tails of every size. Counts tie and a network's values do not: each log-probability is
disturbed by normal noise.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOISE = 0.35  # nats


def corpus(num_bytes: int) -> Iterator[str]:
    """Texts of Python files, those of the installed packages and of the standard library mixed, in a fixed order."""
    paths = sysconfig.get_paths()
    files = sorted({path for name in ("stdlib", "purelib") for path in Path(paths[name]).rglob("*.py")})
    order = np.random.default_rng(0).permutation(len(files))
    for index in order.tolist():
        text = files[index].read_text(errors="replace")
        if 0 < len(text) < 400_000 and num_bytes > 0:
            num_bytes -= len(text)
            yield text


def tokenize(vocab_size: int, num_bytes: int) -> NDArray[np.int64]:
    """Byte-pair ids of the corpus, of a tokenizer trained on the first tenth of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=["<eod>"])
    tokenizer.train_from_iterator(corpus(num_bytes // 10), trainer)
    eod = tokenizer.token_to_id("<eod>")
    texts, pieces = corpus(num_bytes), []
    while batch := [text for _, text in zip(range(256), texts)]:
        pieces += [np.array([*encoding.ids, eod]) for encoding in tokenizer.encode_batch_fast(batch)]
    return np.concatenate(pieces)


class Trigram:
    """The model of ``tokens``: each order takes a share of the next lower one's mass, more where it has seen more."""

    def __init__(self, tokens: NDArray[np.int64], vocab_size: int) -> None:
        self.tokens, self.vocab_size = tokens, vocab_size
        unigram = np.bincount(tokens, minlength=vocab_size) + 0.05
        self.unigram = unigram / unigram.sum()
        self._pairs = _Follows(tokens[:-1], tokens[1:], vocab_size)
        self._triples = _Follows(tokens[:-2] * vocab_size + tokens[1:-1], tokens[2:], vocab_size)

    def log_probs(self, positions: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
        """``[n, V]``: what the model says after the token at each position, which is at least 1."""
        rng = np.random.default_rng(seed)
        mass = np.tile(self.unigram, (len(positions), 1))
        for row, position in zip(mass, positions.tolist()):
            before, last = self.tokens[position - 1 : position + 1].tolist()
            self._pairs.mix(row, last, 0.8, 0.0)
            self._triples.mix(row, before * self.vocab_size + last, 0.5, 0.5)
        logits = np.log(mass, dtype=np.float32)
        logits += NOISE * rng.standard_normal(logits.shape, dtype=np.float32)
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        return logits


class _Follows:
    """How often which id follows each context."""

    def __init__(self, contexts: NDArray[np.int64], ids: NDArray[np.int64], vocab_size: int) -> None:
        self._contexts, numbers = np.unique(contexts, return_inverse=True)
        keys, self._counts = np.unique(numbers * vocab_size + ids, return_counts=True)
        self._starts = np.searchsorted(keys, np.arange(len(self._contexts) + 1) * vocab_size)
        self._ids = keys % vocab_size

    def mix(self, row: NDArray[Any], context: int, novelty: float, discount: float) -> None:
        at = int(np.searchsorted(self._contexts, context))
        if at == len(self._contexts) or self._contexts[at] != context:
            return
        found = slice(self._starts[at], self._starts[at + 1])
        counts = self._counts[found] - discount
        share = counts.sum() / (counts.sum() + novelty * len(counts))
        row *= 1 - share
        row[self._ids[found]] += share * counts / counts.sum()
