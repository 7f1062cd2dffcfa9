"""Continuation of prompts by a model, in batches, across tensor-parallel ranks and pipeline stages.

Prompts of different lengths go together without padding. All sequences of a batch have the same place: the shortest
prompt is read at once, then one token each time, the prompt's where a prompt goes on and the model's where it has
ended. So no sequence ever sees a token of padding or of another sequence, and positions begin at 0 in each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megakd.losses.vocab_parallel import VocabShard
from megakd.model.generation.decoder import Decoder
from megakd.model.generation.sampling import Sampling, next_tokens
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups
from megakd.splitmix64 import states_at


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    ids: its tokens, at least one. max_new_tokens: most tokens that are written. stop_ids: tokens that end the text;
    they are not part of it. stops: called with the tokens written so far, after each; True ends the text behind them.
    draw_key: decides the draws, together with the number of the token alone.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stops: Callable[[Sequence[int]], bool] = lambda ids: False
    draw_key: str = ""

    @property
    def total(self) -> int:
        """Tokens of prompt and continuation together, at most."""
        return len(self.ids) + self.max_new_tokens


@dataclass
class Continuation:
    """Text of a model behind a prompt, as tokens.

    log_probs: log-probability of each token under the model, in nats. finish: ``stop`` if a stop ended it, ``length``
    if all tokens that it may have were written.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


def draw_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """Return a key for each prompt that depends on its tokens, the seed and how often the prompt came before.

    So a prompt's draws do not depend on the others, and two equal prompts get two texts.
    """
    counts: Counter[str] = Counter()
    keys = []
    for ids in prompts:
        text = xxhash.xxh3_128_hexdigest(np.asarray(ids, np.int64).tobytes())
        keys.append(f"generate {seed} {counts[text]} {text}")
        counts[text] += 1
    return keys


def batches_by_length(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Divide requests into batches of similar lengths, longest first; indices into ``requests``."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Generator:
    """One copy of a model that continues prompts; every rank that holds a part of it calls it alike.

    model: this rank's stage, with its part of the head on the last. vocab_size: ids from here on, which are padding or
    have no text, are never chosen.
    """

    def __init__(self, model: HiddenGPTModel, groups: Groups, *, vocab_size: int, sampling: Sampling) -> None:
        self._model, self._groups, self._sampling = model, groups, sampling
        self._shard: VocabShard | None = None
        if groups.is_last_stage:
            rows = model.output_weight().shape[0] * groups.parallel.tensor_model_parallel_size
            self._shard = groups.vocab_shard(vocab_size, padded_vocab_size=rows)
        self._decoder = Decoder(model, groups)

    def run(
        self, requests: Sequence[Request], *, written: Callable[[int, Continuation], None] | None = None
    ) -> list[Continuation]:
        """Continue the prompts of one batch. written: called after each token, with the prompt's index and its text.

        Returns the continuations, on every rank of the copy.
        """
        results = [Continuation() for _ in requests]
        ended = [request.max_new_tokens < 1 for request in requests]
        if all(ended):
            return results
        uniforms_BN = None if self._sampling.greedy else _uniform_numbers(requests)
        self._decoder.start(len(requests), max(request.total for request in requests))
        place = min(len(request.ids) for request in requests)
        tokens = [list(request.ids[:place]) for request in requests]
        for hidden_BH in self._read(tokens):
            writing = [not done and place >= len(request.ids) for request, done in zip(requests, ended)]
            ids = log_probs = None
            if any(writing):
                numbers_B = None
                if uniforms_BN is not None:
                    columns = [
                        min(place - len(request.ids), uniforms_BN.shape[1] - 1) if writes else 0
                        for request, writes in zip(requests, writing)
                    ]
                    numbers_B = uniforms_BN[np.arange(len(requests)), columns]
                ids, log_probs = self._choose(hidden_BH, numbers_B, len(requests))
            for index, (request, result) in enumerate(zip(requests, results)):
                if not writing[index]:
                    tokens[index] = [request.ids[place] if place < len(request.ids) else request.ids[0]]
                    continue
                assert ids is not None and log_probs is not None
                token = ids[index]
                tokens[index] = [token]
                if token in request.stop_ids:
                    result.finish, ended[index] = "stop", True
                    continue
                result.ids.append(token)
                result.log_probs.append(log_probs[index])
                if request.stops(result.ids):
                    result.finish, ended[index] = "stop", True
                ended[index] = ended[index] or len(result.ids) == request.max_new_tokens
                if written is not None:
                    written(index, result)
            if all(ended):
                return results
            place += 1
        raise AssertionError("a text has no end")

    def _read(self, tokens: list[list[int]]) -> Iterator[Tensor | None]:
        """Yield the hidden states behind ``tokens``, then behind what has taken their place, for ever."""
        while True:
            yield self._decoder.read(torch.tensor(tokens, dtype=torch.int64, device=self._groups.device))

    def _choose(
        self, hidden_BH: Tensor | None, numbers_B: NDArray[np.float64] | None, batch_size: int
    ) -> tuple[list[int], list[float]]:
        """Choose the next tokens on the last stage, and tell them to the others."""
        device = self._groups.device
        both_2B = torch.empty(2, batch_size, dtype=torch.float64, device=device)  # ids are exact in float64
        if hidden_BH is not None:
            assert self._shard is not None
            ids_B, log_probs_B = next_tokens(
                hidden_BH,
                self._model.output_weight(),
                shard=self._shard,
                sampling=self._sampling,
                uniforms_B=None if numbers_B is None else torch.from_numpy(numbers_B).to(device),
            )
            both_2B[0], both_2B[1] = ids_B, log_probs_B
        if self._groups.parallel.pipeline_model_parallel_size > 1:
            stages = self._groups.collection.pp
            dist.broadcast(both_2B, src=dist.get_process_group_ranks(stages)[-1], group=stages)
        ids, log_probs = both_2B.tolist()
        return [int(token) for token in ids], log_probs


def _uniform_numbers(requests: Sequence[Request]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 ``[B, N]``: one for each token that may be written."""
    longest = max(request.max_new_tokens for request in requests)
    states = [states_at(np.arange(longest), request.draw_key) for request in requests]
    return (np.stack(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53
