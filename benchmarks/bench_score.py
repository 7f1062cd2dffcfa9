"""What scoring and capturing cost beside the forward pass of the same model.

    python benchmarks/bench_score.py [--samples 2] [--vocab 32768] [--rounds 6] [--json PATH]

12 layers x 1024, sequence 1,024, microbatch 2, fp32, on CPU threads. In turn, in one process and with one model:

- score: all samples of a dataset through what ``megakd score`` does: reading, forward, head, sums, commit and fsync;
- capture: the same for what ``megakd capture`` does: best ids of the head to coded rows, commit and fsync; the 100
  best, and 50 draws;
- the bare forward pass as a user writes it: hidden states, then logits in pieces of 256 tokens that nobody reads;
- the hidden states alone.

A figure is the best of the rounds, which other work on the machine disturbs least; CPU seconds stand beside it, and
tell more on a busy machine with ``--threads 1``. No head can be had for nothing: beside the rate over hidden states
alone stands what the operations of the head's product leave of it at best.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = {"num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16}
CAPTURES: dict[str, dict[str, Any]] = {
    "top 100": {"kind": "top_p_k", "top_k": 100, "top_p": 1.0},
    "top 100, p 0.95": {"kind": "top_p_k", "top_k": 100, "top_p": 0.95},
    "50 draws": {"kind": "samples", "draws": 50},
}


def main() -> None:
    """Measure in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2, help="samples scored in each round")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=MODEL["num_layers"])
    parser.add_argument("--hidden", type=int, default=MODEL["hidden_size"])
    parser.add_argument("--ffn", type=int, default=MODEL["ffn_hidden_size"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        cases, ceiling = _cases(arguments, Path(folder))
        walls: dict[str, list[float]] = {name: [] for name in cases}
        cpus: dict[str, list[float]] = {name: [] for name in cases}
        for counted in range(-1, arguments.rounds):
            for name, run in cases.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                if counted >= 0:
                    walls[name].append(time.perf_counter() - wall)
                    cpus[name].append(time.process_time() - cpu)
    best = [{name: min(values) for name, values in seconds.items()} for seconds in (walls, cpus)]
    _report(*best, ceiling, arguments)


def _report(seconds: dict[str, float], cpus: dict[str, float], ceiling: float, arguments: argparse.Namespace) -> None:
    tokens = arguments.samples * arguments.seq_length
    for name, value in seconds.items():
        print(f"{name:<24} {value:>8.3f} s {cpus[name]:>8.3f} CPU s {tokens / value:>9.0f} tokens/s")
    bare, hidden = "forward with logits", "hidden states"
    rows = [
        _row("scoring rate over the bare forward pass's", seconds[bare] / seconds["score"], least=0.9),
        _row("  the same by CPU seconds", cpus[bare] / cpus["score"]),
        _row("scoring rate over hidden states alone", seconds[hidden] / seconds["score"], least=0.9),
        _row("  the same by CPU seconds", cpus[hidden] / cpus["score"]),
        _row("  the most that the head's product allows", ceiling),
        *(
            _row(f"capturing rate ({name}) over the bare forward pass's", seconds[bare] / seconds[name], least=0.85)
            for name in CAPTURES
        ),
    ]
    print(f"\n{'what':<52} {'value':>8} {'goal':>9}")
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']}x {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<52} {row['value']:>7.2f}x {goal:>12}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def _row(name: str, value: float, *, least: float | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "x", "goal": least, "met": None if least is None else value >= least}


def _cases(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], None]], float]:
    """What is measured, by name, and the share of a forward pass's operations that is not the head's."""
    import numpy as np
    import torch

    from megakd.data.indexed.writer import IndexedWriter
    from megakd.layout import ParallelConfig, padded_vocab_size
    from megakd.model.checkpoint.record import CheckpointRecord
    from megakd.model.config import ModelConfig
    from megakd.model.gpt import build_model
    from megakd.model.initial_weights import set_initial_weights
    from megakd.parallel import init_parallel
    from megakd.pipeline.capture.preflight import CaptureConfig, check_capture_of
    from megakd.pipeline.capture.run import Capturer
    from megakd.pipeline.score.preflight import ScoreConfig, check_score_of
    from megakd.pipeline.score.run import Scorer
    from megakd.teachers.model_teacher import ModelTeacher

    groups = init_parallel(ParallelConfig(), seed=1)
    torch.set_num_threads(arguments.threads)
    sizes = {**MODEL, "num_layers": arguments.layers, "hidden_size": arguments.hidden, "ffn_hidden_size": arguments.ffn}
    shape = ModelConfig(bf16=arguments.bf16, **sizes).resolve("model")
    model_sizes = {"vocab_size": arguments.vocab, "seq_length": arguments.seq_length}
    (model,) = build_model(shape, groups, **model_sizes, with_head=False)
    set_initial_weights([model], shape, groups, vocab_size=arguments.vocab, seed=1)
    rows = padded_vocab_size(
        arguments.vocab, divisible_by=shape.make_vocab_size_divisible_by, tensor_model_parallel_size=1
    )
    head_vH = torch.randn(rows, arguments.hidden, dtype=torch.bfloat16 if arguments.bf16 else torch.float32) * 0.02
    tokens = np.random.default_rng(0).integers(0, arguments.vocab, arguments.samples * arguments.seq_length + 1)
    writer = IndexedWriter(folder / "data", np.int32)
    writer.add_documents(tokens.astype(np.int32), np.array([len(tokens)], np.int32))
    writer.finish(parameters={}, parents={}, tokenizer=None)
    record = CheckpointRecord(folder, "0" * 32, 0, shape, tokenizer=None, loader_state={}, layout={},
                              use_distributed_optimizer=False, rng_states=False, **model_sizes)  # fmt: skip
    common: dict[str, Any] = {
        "load": str(folder),
        "data_path": str(folder / "data"),
        "seq_length": arguments.seq_length,
        "micro_batch_size": arguments.micro_batch_size,
    }
    config = ScoreConfig(**common, output=str(folder / "scores"), range_samples=arguments.samples)
    batches_MBS = torch.from_numpy(tokens[:-1]).view(-1, arguments.micro_batch_size, arguments.seq_length)

    def score() -> None:
        plan = check_score_of(record, config)
        scorer = Scorer(config, plan, ModelTeacher([model], head_vH, groups, groups), groups)
        while (claim := plan.parts.claim()) is not None:
            plan.parts.commit(claim, scorer.make(*plan.parts.bounds(claim.index)), provenance=scorer.provenance)
        for path in (folder / "scores" / "parts").iterdir():
            path.unlink()

    def capture(**kind: Any) -> None:
        store = CaptureConfig(**common, output=str(folder / "store"), shard_samples=arguments.samples, **kind)
        plan = check_capture_of(record, store)
        capturer = Capturer(store, plan, ModelTeacher([model], head_vH, groups, groups), groups)
        while (claim := plan.work.claim()) is not None:
            result = capturer.make(*plan.work.bounds(claim.index), ids=plan.work.ids_of(claim.index))
            plan.work.commit(claim, result, provenance=capturer.provenance)
        shutil.rmtree(folder / "store")

    @torch.no_grad()
    def forward(with_logits: bool) -> None:
        for tokens_BS in batches_MBS:
            hidden_SBH = model(tokens_BS, None, None)
            for rows_RH in hidden_SBH.view(-1, arguments.hidden).split(256) if with_logits else ():
                rows_RH @ head_vH.t()

    body = shape.flops_forward(seq_length=arguments.seq_length, vocab_size=0)
    whole = shape.flops_forward(seq_length=arguments.seq_length, vocab_size=arguments.vocab)
    cases = {
        "score": score,
        **{name: functools.partial(capture, **kind) for name, kind in CAPTURES.items()},
        "forward with logits": lambda: forward(True),
        "hidden states": lambda: forward(False),
    }
    return cases, body / whole


if __name__ == "__main__":
    main()
