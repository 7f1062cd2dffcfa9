"""Generating: the prompts' batches dealt to the copies of the model, and what they write printed or saved."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch.distributed as dist

from megakd.artefacts.manifest import atomic_write
from megakd.errors import ExitStatus
from megakd.model.checkpoint.load import load_weights
from megakd.model.checkpoint.tensor_names import check_weights
from megakd.model.generation.generate import Continuation, Generator, Request, batches_by_length, draw_keys
from megakd.model.generation.sampling import Sampling
from megakd.model.gpt import build_model
from megakd.parallel import Groups, init_parallel
from megakd.pipeline.generate.config import GenerateConfig
from megakd.pipeline.generate.preflight import GeneratePlan
from megakd.pipeline.generate.text import TextStream, text_behind
from megakd.work.console import tell
from megakd.work.progress import Progress, clock


def generate(config: GenerateConfig, plan: GeneratePlan) -> ExitStatus:
    """Continue all prompts and print the texts, or write them to ``--output``. All ranks call it."""
    groups = init_parallel(config.parallel(), seed=config.seed)
    generator = build_generator(plan, groups, Sampling(config.drawn_at, config.top_k, config.top_p))
    keys = draw_keys([prompt.ids for prompt in plan.prompts], config.seed)
    requests = [
        Request(prompt.ids, prompt.max_new_tokens, plan.stop_ids, draw_key=key)
        for prompt, key in zip(plan.prompts, keys)
    ]
    if groups.rank == 0 and plan.cut:
        tell(f"{plan.cut} of {len(requests)} texts end earlier than asked, where the model's positions do")
    streams = len(requests) == 1 and groups.rank == 0 and config.output is None
    started = time.monotonic()
    if streams:
        results = {0: _run_aloud(generator, requests[0], plan)}
    else:
        results = _run_batches(generator, requests, groups, config)
    if groups.rank > 0:
        return ExitStatus.COMPLETE
    seconds = max(time.monotonic() - started, 1e-9)
    if config.output is not None:
        atomic_write(config.output, b"".join(_record(plan, index, results[index]) for index in range(len(requests))))
        tell(f"{config.output}: {len(requests)} texts")
    elif not streams:
        _print_all(plan, results)
    written = sum(len(result.ids) for result in results.values())
    tell(f"{written} tokens in {seconds:.1f} s, {written / seconds:.1f} tokens/s")
    return ExitStatus.COMPLETE


def build_generator(plan: GeneratePlan, groups: Groups, sampling: Sampling) -> Generator:
    """Load the model in the layout of ``groups``. All ranks call it."""
    record, shape = plan.record, plan.shape
    check_weights(record.path, record.shape, "--load")
    chunks = build_model(shape, groups, vocab_size=record.vocab_size, seq_length=plan.positions or 1)
    load_weights(record, chunks, groups)
    (model,) = chunks
    model.requires_grad_(False)
    # ids behind the tokenizer's last one are the model's padding: they have no text
    vocab_size = min(record.vocab_size, plan.tokenizer.vocab_size)
    return Generator(model, groups, vocab_size=vocab_size, sampling=sampling)


def _run_aloud(generator: Generator, request: Request, plan: GeneratePlan) -> Continuation:
    """Continue one prompt, and print the text while it is written."""
    (prompt,) = plan.prompts
    stream = TextStream(plan.tokenizer, prompt.ids)
    print(prompt.text, end="", flush=True)
    (result,) = generator.run([request], written=lambda _index, text: print(stream.piece(text.ids), end="", flush=True))
    print(stream.piece(result.ids, ended=True))
    return result


def _run_batches(
    generator: Generator, requests: list[Request], groups: Groups, config: GenerateConfig
) -> dict[int, Continuation]:
    """Continue this copy's share of the batches; return all continuations by index on rank 0."""
    batches = batches_by_length(requests, config.micro_batch_size)[groups.data_rank :: groups.data_size]
    progress = Progress(sum(map(len, batches)), done=0, interval=config.log_interval)
    results: dict[int, Continuation] = {}
    for batch in batches:
        results |= dict(zip(batch, generator.run([requests[index] for index in batch])))
        progress.done += len(batch)
        if groups.rank == 0 and progress.done < progress.total and progress.is_due():
            copies = "" if groups.data_size == 1 else f" of the first of {groups.data_size} copies"
            tokens = sum(len(result.ids) for result in results.values())
            tell(
                f"continued {progress.done:.0f} of {progress.total:.0f} prompts{copies}, "
                f"{tokens / progress.seconds:.1f} tokens/s, {clock(progress.seconds_left)} left"
            )
    if groups.world_size == 1:
        return results
    gathered: list[dict[int, Continuation]] = [{} for _ in range(groups.world_size)]
    speaks = groups.tensor_rank == 0 and groups.is_first_stage  # every rank of a copy has the same
    dist.gather_object(results if speaks else {}, gathered if groups.rank == 0 else None)
    return {index: result for part in gathered for index, result in part.items()}


def _record(plan: GeneratePlan, index: int, result: Continuation) -> bytes:
    prompt = plan.prompts[index]
    values: dict[str, Any] = {
        "prompt": prompt.text,
        "text": text_behind(plan.tokenizer, prompt.ids, result.ids),
        "tokens": result.ids,
        "log_probs": [round(value, 6) for value in result.log_probs],
        "finish": result.finish,
    }
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _print_all(plan: GeneratePlan, results: dict[int, Continuation]) -> None:
    for index, prompt in enumerate(plan.prompts):
        text = text_behind(plan.tokenizer, prompt.ids, results[index].ids)
        print(f"--- {index + 1} of {len(plan.prompts)}\n{prompt.text}{text}")
    sys.stdout.flush()
