"""Every kind of loss, forward and backward, against what a user would pick today and against what the machine allows.

    python benchmarks/bench_loss.py [--groups head dense tp sparse] [--vocab 32000 131072] [--tokens 2048]
        [--repeats 5] [--threads 2] [--device cpu] [--megatron-training DIR] [--quick] [--json PATH]

Groups, all in bf16:
    head    output head with LM and distillation loss, student hidden 512, teacher hidden 1,024
    dense   forward KL from logits of both models that exist
    tp      the same, the vocabulary split over two processes of one thread each (two GPUs)
    sparse  forward KL to a teacher's 100 best ids and one bucket for the others, from the student's logits

Peers that are not installed are skipped with the reason. What they need:
    head       pip install --no-deps liger-kernel
    dense, tp  pip install --no-deps nvidia-modelopt
               pip install omegaconf pulp pydantic regex requests rich safetensors scipy
    sparse     megatron-core 0.19, which takes Python 3.12; elsewhere its wheel, unpacked into DIR

Every case has processes of its own, which take turns; figures are medians over the turns. Time is the wall time of
forward and backward. Memory is the rise of the peak (resident memory, or the device's) over what was held, inputs
included, as a multiple of the student's bf16 logits. The first turn warms up and compares gradients with float64 in
some rows: ours must agree, or the benchmark ends with an error. Collectives are those of one forward pass; a peer's
include the reduction of the loss that it leaves to its caller. The bound is the bytes that must move at the copy
bandwidth plus the operations at the rate of a square matrix product, both measured in turn with the rest.
Megatron stores cached ids in 17 bits, so that its loss is for vocabularies up to 131,072; ours goes on to 2^18.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loss_inputs import HIDDEN, TEACHER_HIDDEN, Problem
from loss_peers import BANDWIDTH_ENTRIES, MATMUL_SIZE
from loss_turns import CASES, MACHINE, FailedError, SkippedError, Worker

TITLES = {"head": "head + KD", "dense": "dense KD", "tp": "dense KD, TP 2", "sparse": "sparse KD, k 100"}
LARGEST_MEGATRON_VOCAB, LARGEST_SPARSE_VOCAB = 1 << 17, 1 << 18
QUICK_TOKENS, QUICK_VOCAB, QUICK_SPARSE_VOCAB = 96, 1000, 2000
GPU_MOST_BYTES = 12.0


@dataclass(frozen=True)
class Figures:
    """Medians of one case: seconds, memory in units of the logits, and the gradient and collectives of its turns."""

    seconds: float
    memory: float
    error: float | None
    collectives: int | None


@dataclass(frozen=True)
class Ratio:
    """A row of the result: one figure of a case over that of another (over the logits, for memory, where none)."""

    what: str
    figure: str
    over: str
    under: str | None
    least: float | None = None
    most: float | None = None
    gpu_least: float | None = None
    goal_from_vocab: int = 32000


RATIOS = {
    "head": (
        Ratio("time over the products alone", "seconds", "megakd", "products", most=1.2, goal_from_vocab=131072),
        Ratio("liger (KD alone) time over ours", "seconds", "liger KD", "megakd", least=1.25, goal_from_vocab=131072),
        Ratio("liger time over ours", "seconds", "liger LM + KD", "megakd"),
        Ratio("unfused time over ours", "seconds", "unfused", "megakd", least=2.4, goal_from_vocab=131072),
        Ratio("memory over liger's (KD alone)", "memory", "megakd", "liger KD", most=0.6, goal_from_vocab=131072),
        Ratio("memory over logits", "memory", "megakd", None),
    ),
    "dense": (
        Ratio("modelopt time over ours", "seconds", "modelopt", "megakd", least=40, gpu_least=8),
        Ratio("naive time over ours", "seconds", "naive", "megakd"),
        Ratio("compiled time over ours", "seconds", "compiled", "megakd"),
        Ratio("time over reading both and writing one", "seconds", "megakd", "copy", most=4),
        Ratio("memory over logits", "memory", "megakd", None, most=0.1),
    ),
    "tp": (
        Ratio("modelopt time over ours", "seconds", "modelopt", "megakd", least=30, gpu_least=8),
        Ratio("collectives in the forward", "collectives", "megakd", None, most=1),
        Ratio("collectives in the forward, modelopt", "collectives", "modelopt", None),
        Ratio("memory over logits", "memory", "megakd", None),
    ),
    "sparse": (
        Ratio("megatron time over ours", "seconds", "megatron", "megakd", least=25, goal_from_vocab=131072),
        Ratio("memory over logits", "memory", "megakd", None),
    ),
}


def main() -> None:
    """Print a table for each problem, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 131072])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--threads", type=int, default=2, help="of a process; halved where two work together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--megatron-training", metavar="DIR", help="folder with an unpacked wheel of megatron-core 0.19"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, one turn, nothing compiled: does it run at all?")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.vocab, arguments.repeats = [QUICK_TOKENS], [QUICK_VOCAB], 1
    rows: list[dict[str, Any]] = []
    for group, problem in _problems(arguments):
        found = measure(group, problem, arguments)
        if "megakd" in found:
            rows += report(group, problem, found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def _problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Problem]]:
    for group in arguments.groups:
        vocabs = list(arguments.vocab)
        if group == "sparse":
            vocabs.append(QUICK_SPARSE_VOCAB if arguments.quick else LARGEST_SPARSE_VOCAB)
        for tokens in arguments.tokens:
            for vocab in dict.fromkeys(vocabs):
                problem = Problem(tokens, vocab, arguments.device, megatron_training=arguments.megatron_training)
                yield group, replace(problem, world=2) if group == "tp" else problem


def measure(group: str, problem: Problem, arguments: argparse.Namespace) -> dict[str, Figures]:
    """The figures of every case that can run, by name. Raises FailedError where ours does not, or is wrong."""
    title = _title(group, problem)
    print(f"\n{title}", flush=True)
    threads = max(1, arguments.threads // problem.world)
    turns: dict[str, list[tuple[float, int]]] = {}
    firsts: dict[str, tuple[float | None, int | None]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, case in CASES[group].items():
            if name == "megatron" and problem.vocab > LARGEST_MEGATRON_VOCAB:
                print(f"  skipped {name}: its ids are of 17 bits")
            elif not (arguments.quick and case.compiles):
                workers[name] = stack.enter_context(Worker(name, case, problem, threads))
        for name, case in MACHINE.items():
            workers[name] = stack.enter_context(Worker(name, case, replace(problem, world=1), arguments.threads))
        for turn in range(arguments.repeats + 1):
            for name, worker in list(workers.items()):
                try:
                    if turn == 0:
                        firsts[name] = worker.first_turn()
                        _check(f"{title}: {name}", firsts[name][0])
                    else:
                        turns.setdefault(name, []).append(worker.turn())
                except SkippedError as reason:
                    print(f"  skipped {name}: {reason}", flush=True)
                    workers.pop(name).close()
    logits_bytes = 2 * problem.tokens * problem.vocab
    return {
        name: Figures(
            statistics.median(seconds for seconds, _ in turns[name]),
            statistics.median(rise_bytes / logits_bytes for _, rise_bytes in turns[name]),
            *firsts[name],
        )
        for name in workers
    }


def _check(name: str, error: float | None) -> None:
    """Refuse a gradient of ours that is off by more than precision explains; a peer's is only shown."""
    if ": megakd" in name and (error is None or not error <= 1):
        raise FailedError(f"{name}: the gradient is off by {error} times what precision explains")


def report(group: str, problem: Problem, found: dict[str, Figures]) -> list[dict[str, Any]]:
    """Rows ``{name, value, unit, goal, met}``, printed."""
    title, ours, rows = _title(group, problem), found["megakd"], []
    print(f"  {'':<22}{'s':>9}{'x ours':>9}{'memory, x logits':>18}{'gradient off by':>17}")
    for name, one in found.items():
        if name in MACHINE:
            continue
        rows.append(_row(f"{title}: {name}", one.seconds, "s"))
        error = "" if one.error is None else f"{one.error:.2f}"
        print(f"  {name:<22}{one.seconds:>9.4f}{one.seconds / ours.seconds:>9.2f}{one.memory:>18.2f}{error:>17}")
    on_gpu = problem.device != "cpu"
    for ratio in RATIOS[group]:
        if not {ratio.over, ratio.under or ratio.over} <= set(found):
            continue
        value = getattr(found[ratio.over], ratio.figure)
        if ratio.under is not None:
            value /= getattr(found[ratio.under], ratio.figure)
        least = ratio.gpu_least if on_gpu else ratio.least
        # Goals of time and memory are those of a CPU, unless they say otherwise; how many collectives, of any machine.
        most = ratio.most if not on_gpu or ratio.figure == "collectives" else None
        unit = "" if ratio.figure == "collectives" else "x"
        if problem.vocab < ratio.goal_from_vocab and ratio.figure != "collectives":
            least = most = None
        rows.append(_row(f"{title}: {ratio.what}", value, unit, least, most))
    rows += _bound_rows(group, problem, found)
    for row in rows:
        if row["unit"] != "s":
            goal = "" if row["goal"] is None else f"goal {row['goal']:g}: {'met' if row['met'] else 'NOT MET'}"
            print(f"    {row['name'].removeprefix(title + ': '):<46}{row['value']:>9.3f} {row['unit']:<2} {goal}")
    return rows


def _bound_rows(group: str, problem: Problem, found: dict[str, Figures]) -> list[dict[str, Any]]:
    bandwidth = 4 * BANDWIDTH_ENTRIES / found["copy bandwidth"].seconds
    rate = 2 * MATMUL_SIZE**3 / found["matmul rate"].seconds
    logits = problem.tokens * problem.vocab
    if group == "head":  # weights and hidden states of both models are read, the student's gradients written
        moved = 2 * (problem.vocab + problem.tokens) * (2 * HIDDEN + TEACHER_HIDDEN)
        operations = 2 * logits * (3 * HIDDEN + TEACHER_HIDDEN)
    else:
        moved, operations = (4 if group == "sparse" else 6) * logits, 0
    title, seconds = _title(group, problem), found["megakd"].seconds
    rows = [
        _row(f"{title}: bound", moved / bandwidth + operations / rate, "s"),
        _row(f"{title}: time over the bound", seconds / (moved / bandwidth + operations / rate), "x"),
    ]
    if group == "dense":
        most = GPU_MOST_BYTES if problem.device != "cpu" else None
        value = seconds * bandwidth / logits
        rows.append(_row(f"{title}: bytes a logit that its time would copy", value, "B", None, most))
    return rows


def _title(group: str, problem: Problem) -> str:
    return f"{TITLES[group]}, T {problem.tokens}, V {problem.vocab}"


def _row(name: str, value: float, unit: str, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    met = value >= least if least is not None else value <= most if most is not None else None
    return {"name": name, "value": value, "unit": unit, "goal": least if least is not None else most, "met": met}


if __name__ == "__main__":
    main()
