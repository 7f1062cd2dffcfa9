"""Output head with LM and distillation loss, forward and backward, against its matrix products and the unfused form.

    python benchmarks/bench_head.py [--vocab 32768 131072] [--repeats 5] [--threads 2] [--json PATH]

bf16, 2,048 tokens, student hidden 512, teacher hidden 1,024. ``products`` are the four matrix products that any
implementation needs (logits of both models, dHidden, dWeight), on whole tensors. ``unfused`` is plain torch on whole
logits: cross-entropy and KL in fp32, autograd. Repeats alternate in one process; ratios are of medians. Memory is the
rise of the process's peak over what it held before, as a multiple of the student's bf16 logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megakd.losses.head import KDTerm, VocabShard, head_loss
from megakd.targets import DenseTargets

TOKENS, HIDDEN, TEACHER_HIDDEN = 2048, 512, 1024
GOAL_OVER_PRODUCTS, GOAL_OVER_UNFUSED = 1.2, 2.4


@dataclass(frozen=True)
class Inputs:
    hidden_TH: Tensor
    weight_VH: Tensor
    teacher: DenseTargets
    labels_T: Tensor
    lm_weight_T: Tensor
    kd_weight_T: Tensor

    @staticmethod
    def make(vocab_size: int) -> Inputs:
        torch.manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return torch.randn(rows, columns).mul_(scale).bfloat16()

        return Inputs(
            normal(TOKENS, HIDDEN, 0.5).requires_grad_(),
            normal(vocab_size, HIDDEN, 4 / HIDDEN**0.5).requires_grad_(),
            DenseTargets(
                normal(TOKENS, TEACHER_HIDDEN, 0.5), normal(vocab_size, TEACHER_HIDDEN, 4 / TEACHER_HIDDEN**0.5)
            ),
            torch.randint(0, vocab_size, (TOKENS,)),
            torch.full((TOKENS,), 0.5 / TOKENS),
            torch.full((TOKENS,), 0.5 / TOKENS),
        )


def main() -> None:
    """Print the table, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for vocab_size in arguments.vocab:
        rows += measure(vocab_size, arguments.repeats)
    for row in rows:
        sign = "" if row["goal"] is None else f"goal {row['goal']}: {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<62} {row['value']:>8.3f} {row['unit']:<2} {sign}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(vocab_size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows ``{name, value, unit, goal, met}`` for one vocabulary."""
    inputs = Inputs.make(vocab_size)
    cases: dict[str, Callable[[Inputs], None]] = {"products": products, "megakd": fused, "unfused": unfused}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, float] = {}
    for _ in range(repeats):
        for name, case in cases.items():
            inputs.hidden_TH.grad = inputs.weight_VH.grad = None
            held = _reset_peak_bytes()
            start = time.perf_counter()
            case(inputs)
            seconds[name].append(time.perf_counter() - start)
            memory[name] = (_status_bytes("VmHWM") - held) / (TOKENS * vocab_size * 2)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    what = f"head + KD, T {TOKENS}, V {vocab_size}"
    over_products, over_unfused = median["megakd"] / median["products"], median["unfused"] / median["megakd"]
    big = vocab_size >= 131072
    rows = [{"name": f"{what}: {name}", "value": value, "unit": "s", "goal": None} for name, value in median.items()]
    rows += [
        _row(
            f"{what}: time over the products alone",
            over_products,
            GOAL_OVER_PRODUCTS,
            over_products <= GOAL_OVER_PRODUCTS,
        ),
        _row(
            f"{what}: unfused time over ours",
            over_unfused,
            GOAL_OVER_UNFUSED if big else None,
            over_unfused >= GOAL_OVER_UNFUSED,
        ),
        _row(f"{what}: memory over logits, megakd", memory["megakd"], None, True),
        _row(f"{what}: memory over logits, unfused", memory["unfused"], None, True),
    ]
    return rows


def fused(inputs: Inputs) -> None:
    """The head of this project."""
    head_loss(
        inputs.hidden_TH,
        inputs.weight_VH,
        inputs.labels_T,
        shard=VocabShard(0, inputs.weight_VH.shape[0], inputs.weight_VH.shape[0], None),
        lm_weight_T=inputs.lm_weight_T,
        kd_weight_T=inputs.kd_weight_T,
        kd=KDTerm(),
        targets=inputs.teacher,
    ).loss.backward()


def unfused(inputs: Inputs) -> None:
    """Whole logits, fp32 losses, autograd."""
    student_TV = (inputs.hidden_TH @ inputs.weight_VH.t()).float()
    teacher_TV = (inputs.teacher.hidden_TH @ inputs.teacher.weight_vH.t()).float()
    log_q, log_p = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    lm_T = functional.nll_loss(log_q, inputs.labels_T, reduction="none")
    kd_T = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    (inputs.lm_weight_T * lm_T + inputs.kd_weight_T * kd_T).sum().backward()


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """The matrix products alone."""
    logits_TV = inputs.hidden_TH @ inputs.weight_VH.t()
    torch.mm(inputs.teacher.hidden_TH, inputs.teacher.weight_vH.t(), out=logits_TV)
    logits_TV @ inputs.weight_VH
    logits_TV.t() @ inputs.hidden_TH


def _row(name: str, value: float, goal: float | None, met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "x", "goal": goal, "met": None if goal is None else met}


def _reset_peak_bytes() -> int:
    """Forget the peak so far; the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
