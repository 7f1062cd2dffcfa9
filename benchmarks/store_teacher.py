"""Rows for benchmarks: a teacher's from captures, or those of a trigram model of the Python sources on this machine.

The trigram model's rows have what rows of a trained teacher have and random ones do not: ids by Zipf's law, sets of
likely ids that depend on the context, heads and tails of every size. Counts tie and a network's values do not: each
log-probability is disturbed by normal noise.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.logits.store import LogitsStore

NOISE = 0.35  # nats
TOP_K, DRAWS = 128, 50
SEQ_LENGTH = 1024  # of the trigram model's samples


@dataclass(frozen=True)
class Teacher:
    """A teacher's readings at ``T`` token positions, whole samples of ``seq_length``.

    ids_TK, log_probs_TK: ``[T, 128]``, best first. drawn_ids_TD, drawn_counts_TD: 50 draws, 0 in an empty slot.
    input_ids_T. counts_V: how often the dataset has each id.
    """

    seq_length: int
    ids_TK: NDArray[np.int64]
    log_probs_TK: NDArray[np.float32]
    entropy_T: NDArray[np.float32]
    drawn_ids_TD: NDArray[np.int64]
    drawn_counts_TD: NDArray[np.int32]
    input_ids_T: NDArray[np.int64]
    counts_V: NDArray[np.int64]


def trigram_teacher(num_rows: int, *, vocab_size: int, corpus_bytes: int) -> Teacher:
    """Rows of the trigram model, at samples that lie anywhere in its text."""
    tokens = tokenize(vocab_size, corpus_bytes)
    model = Trigram(tokens, vocab_size)
    rng = np.random.default_rng(1)
    firsts = rng.integers(1, len(tokens) - SEQ_LENGTH, num_rows // SEQ_LENGTH)
    positions = (firsts[:, None] + np.arange(SEQ_LENGTH)).ravel()
    parts: list[tuple[NDArray[Any], ...]] = []
    for seed, chunk in enumerate(np.array_split(positions, len(positions) // 256)):
        log_probs = model.log_probs(chunk, seed)
        best = np.argpartition(-log_probs, TOP_K, 1)[:, :TOP_K]
        values = np.take_along_axis(log_probs, best, 1)
        order = np.argsort(-values, 1, kind="stable")
        probs = np.exp(log_probs, dtype=np.float64)
        mass = probs.cumsum(1)
        uniform = rng.random((len(chunk), DRAWS)) * mass[:, -1:]
        entropy = -(probs * log_probs).sum(1, dtype=np.float32)
        draws = np.stack([np.searchsorted(m, u, side="right") for m, u in zip(mass, uniform)])
        parts.append((np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1), entropy, draws))
    ids, log_probs, entropy, draws = (np.concatenate(column) for column in zip(*parts))
    counts = np.bincount(tokens, minlength=vocab_size)
    return Teacher(SEQ_LENGTH, ids, log_probs, entropy, *count(draws), tokens[positions], counts)


def captured_teacher(top_k_store: Path, samples_store: Path, data_path: str, num_rows: int) -> Teacher:
    """Rows of two captures of one teacher over one dataset: the 128 best ids in 32 bits, and 50 draws."""
    dataset = IndexedDataset(data_path)
    best, drawn = (LogitsStore(folder, dataset=dataset.fingerprint) for folder in (top_k_store, samples_store))
    samples = ConcatSamples(dataset, best.spec.seq_length)
    ids = [
        sample for sample in range(samples.num_samples - 1) if best.has_targets(sample) and drawn.has_targets(sample)
    ]
    spread = np.array(ids)[np.linspace(0, len(ids), num_rows // samples.seq_length, endpoint=False).astype(np.int64)]
    inputs = samples.read(spread)[:, :-1]
    rows, draws = best.read_batch(spread, inputs), drawn.read_batch(spread, inputs)
    order = np.argsort(-rows.log_probs_BSK, axis=2, kind="stable")
    ids_TK, log_probs_TK, drawn_ids, shares = (
        array.reshape(inputs.size, -1)
        for array in (
            np.take_along_axis(rows.ids_BSK, order, 2),
            np.take_along_axis(rows.log_probs_BSK, order, 2),
            draws.ids_BSK,
            draws.log_probs_BSK,
        )
    )
    times = np.rint(np.exp(shares) * drawn.spec.draws).astype(np.int32)
    counts = np.bincount(dataset.tokens, minlength=best.spec.vocab_size)
    entropy = rows.entropy_BS.ravel()
    return Teacher(samples.seq_length, ids_TK, log_probs_TK, entropy, drawn_ids, times, inputs.ravel(), counts)


def count(draws: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids ``[T, D]`` and how often each was drawn."""
    found = [np.unique(row, return_counts=True) for row in draws]
    width = max(len(ids) for ids, _ in found)
    ids, counts = np.zeros((len(draws), width), np.int64), np.zeros((len(draws), width), np.int32)
    for row, (own, times) in enumerate(found):
        ids[row, : len(own)], counts[row, : len(own)] = own, times
    return ids, counts


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
    """Counts of the ids that follow each context."""

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
