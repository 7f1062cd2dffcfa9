"""Tiny models that write text, in any layout, and the slow obvious way to the same tokens. Runs in a world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megakd.model.config import ModelConfig

VOCAB = 101
SHAPE: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2,
    "make_vocab_size_divisible_by": 4, "init_method_std": 0.4, "add_qkv_bias": True, "qk_layernorm": True,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "nucleus": {"temperature": 1.5, "top_p": 0.7},
    "hot": {"temperature": 1.3},
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3], [8, 4], [3, 1, 4, 1, 5]]


def build(tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> tuple[Any, Any]:
    """This rank's stage of the model, and its groups."""
    from megakd.layout import ParallelConfig
    from megakd.model.gpt import build_model
    from megakd.model.initial_weights import set_initial_weights
    from megakd.parallel import init_parallel

    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, sequence_parallel=sequence_parallel
    )
    groups = init_parallel(parallel, seed=1)
    shape = ModelConfig(**SHAPE).resolve("test")
    chunks = build_model(shape, groups, vocab_size=VOCAB, seq_length=32)
    set_initial_weights(chunks, shape, groups, vocab_size=VOCAB, seed=7)
    return chunks[0].eval(), groups


def continue_prompts(
    prompts: list[list[int]],
    layout: tuple[int, int] = (1, 1),
    batch_size: int = 100,
    sampling: dict[str, Any] | None = None,
    new: int = 12,
    stop_ids: tuple[int, ...] = (),
    seed: int = 5,
    sequence_parallel: bool = False,
    stops: Callable[[Sequence[int]], bool] = lambda ids: False,
) -> list[tuple[list[int], list[float], str]]:
    """Tokens, log-probabilities and the reason of the end for each prompt, in their order."""
    from megakd.model.generation.generate import Generator, Request, batches_by_length, draw_keys
    from megakd.model.generation.sampling import Sampling

    model, groups = build(*layout, sequence_parallel)
    generator = Generator(model, groups, vocab_size=VOCAB, sampling=Sampling(**(sampling or {})))
    keys = draw_keys(prompts, seed)
    requests = [Request(tuple(ids), new, frozenset(stop_ids), stops, key) for ids, key in zip(prompts, keys)]
    results: dict[int, Any] = {}
    for batch in batches_by_length(requests, batch_size):
        results |= dict(zip(batch, generator.run([requests[index] for index in batch])))
    return [(results[i].ids, results[i].log_probs, results[i].finish) for i in range(len(prompts))]


def continue_ways(layout: tuple[int, int], batch_size: int, turned: bool = False) -> dict[str, Any]:
    """Continuations of ``PROMPTS`` by each of ``WAYS``. turned: the different ones are in another order."""
    prompts = PROMPTS[-2::-1] + PROMPTS[-1:] if turned else PROMPTS
    results = {way: continue_prompts(prompts, layout, batch_size, sampling) for way, sampling in WAYS.items()}
    return {way: found[-2::-1] + found[-1:] if turned else found for way, found in results.items()}


def logits_behind(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits ``[V]`` behind ``ids``, by a forward pass over all of them."""
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), None, None)[-1, 0]
        logits: torch.Tensor = (hidden @ model.output_weight().t())[:VOCAB]
        return logits


def twin(prompts: list[list[int]], new: int = 12, stop_ids: tuple[int, ...] = ()) -> list[tuple[list[int], float]]:
    """Greedy tokens and the sum of their log-probabilities, each by a forward pass over the whole text so far."""
    model, _ = build()
    results = []
    for prompt in prompts:
        ids, total = list(prompt), 0.0
        for _ in range(new):
            logits = logits_behind(model, ids)
            token = int(logits.argmax())
            if token in stop_ids:
                break
            total += float(logits.log_softmax(-1)[token])
            ids.append(token)
        results.append((ids[len(prompt) :], total))
    return results
