"""One distillation step against megatron-core with nvidia-modelopt's loss, and against what the arithmetic allows.

    python benchmarks/bench_step.py [--repeats 3] [--vocab 32768] [--json PATH]

Teacher 12 x 1024, student 8 x 512, sequence 1,024, microbatch 2, bf16, forward and backward on CPU threads, without an
optimizer.
The cases alternate, each in a process of its own; a figure is the median over the processes of the median of their
steps. Peak memory is the resident size above what stood before the first step. Peers that are not installed
(``nvidia-modelopt``) are skipped with the reason. The step with a teacher cannot cost less than the LM step and the
teacher's forward pass; both are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STUDENT = {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8}
TEACHER = {"num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16}
CASES = ("megakd", "megatron+modelopt", "megakd LM", "megakd teacher", "megatron LM")


def main() -> None:
    """Run every case in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--steps", type=int, default=5, help="steps counted in each process")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for case in CASES:
            result = _run_case(case, arguments)
            if isinstance(result, str):
                print(f"skipped {case}: {result}")
            else:
                found.setdefault(case, []).append(result)
    _report(found, arguments)


def _run_case(case: str, arguments: argparse.Namespace) -> dict[str, float] | str:
    command = [sys.executable, "-W", "ignore", __file__, "--case", case, "--steps", str(arguments.steps)]
    command += ["--vocab", str(arguments.vocab), "--seq-length", str(arguments.seq_length)]
    command += ["--micro-batch-size", str(arguments.micro_batch_size)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(_cores())})
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["no output"])[-1]
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


def _report(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    medians = {
        case: {key: statistics.median(result[key] for result in results) for key in ("seconds", "cpu", "peak")}
        for case, results in found.items()
    }
    print(f"\n{'case':<20} {'s/step':>8} {'CPU s':>8} {'peak MB':>9} {'tokens/s':>9}")
    tokens = arguments.seq_length * arguments.micro_batch_size
    for case, values in medians.items():
        print(
            f"{case:<20} {values['seconds']:>8.3f} {values['cpu']:>8.3f} {values['peak'] / 1e6:>9.0f} "
            f"{tokens / values['seconds']:>9.0f}"
        )
    rows: list[dict[str, Any]] = []
    ours, peer = medians["megakd"], medians.get("megatron+modelopt")
    if peer:
        rows.append(_row("KD step, times as fast as megatron+modelopt", peer["seconds"] / ours["seconds"], least=1.2))
        rows.append(_row("KD step, peak memory over megatron+modelopt's", ours["peak"] / peer["peak"], most=0.6))
    theory = medians["megakd LM"]["seconds"] + medians["megakd teacher"]["seconds"]
    rows.append(_row("KD step over LM step + teacher's forward", ours["seconds"] / theory, most=1.05))
    lm, megatron = medians["megakd LM"], medians.get("megatron LM")
    if megatron:
        rows.append(_row("LM step, times as fast as megatron-core's", megatron["seconds"] / lm["seconds"]))
        rows.append(_row("LM step, peak memory over megatron-core's", lm["peak"] / megatron["peak"]))
    print(f"\n{'what':<52} {'value':>8} {'goal':>9}")
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']}x {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<52} {row['value']:>7.2f}x {goal:>12}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def _row(name: str, value: float, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    met = value >= least if least is not None else value <= most if most is not None else None
    return {"name": name, "value": value, "unit": "x", "goal": least if least is not None else most, "met": met}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# --- one case, in a process of its own --------------------------------------------------------------------------------


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    warnings.simplefilter("ignore")
    import torch

    torch.manual_seed(0)
    step = _STEPS[arguments.case](arguments)
    torch.set_num_threads(_cores())
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    step()
    walls, cpus = [], []
    for _ in range(arguments.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "seconds": statistics.median(walls),
        "cpu": statistics.median(cpus),
        "peak": float(_peak_bytes() - before),
    }


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _batch(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    shape = (arguments.micro_batch_size, arguments.seq_length)
    return torch.randint(0, arguments.vocab, shape), torch.randint(0, arguments.vocab, shape)


def _ours(arguments: argparse.Namespace, sizes: dict[str, int], groups: Any, with_head: bool) -> Any:
    from megakd.model.config import ModelConfig
    from megakd.model.gpt import build_model
    from megakd.model.initial_weights import set_initial_weights

    shape = ModelConfig(bf16=True, **sizes).resolve("model")
    models = build_model(
        shape, groups, vocab_size=arguments.vocab, seq_length=arguments.seq_length, with_head=with_head
    )
    set_initial_weights(models, shape, groups, vocab_size=arguments.vocab, seed=1)
    return models[0]


def _groups() -> Any:
    from megakd.layout import ParallelConfig
    from megakd.parallel import init_parallel

    return init_parallel(ParallelConfig(), seed=1)


def _megakd(arguments: argparse.Namespace, *, student: bool = True, teacher: bool = True) -> Callable[[], None]:
    import torch

    from megakd.losses.head import KD, KDTerm, VocabShard, head_loss
    from megakd.targets import DenseTargets

    groups = _groups()
    tokens, labels = _batch(arguments)
    one = _ours(arguments, STUDENT, groups, with_head=True)
    other = _ours(arguments, TEACHER, groups, with_head=False).eval()
    head_vH = torch.randn(arguments.vocab, TEACHER["hidden_size"], dtype=torch.bfloat16) * 0.02
    shard = VocabShard(start=0, num_rows=arguments.vocab, vocab_size=arguments.vocab, group=None)
    labels_T, ones_T = labels.t().reshape(-1), torch.ones(labels.numel())

    def flat(hidden_SBH: Any) -> Any:
        return hidden_SBH.reshape(-1, hidden_SBH.shape[-1])

    def step() -> None:
        hidden_TH = None
        if teacher:
            with torch.no_grad():
                hidden_TH = flat(other(tokens, None, None))
                if not student:  # the bare forward pass has a head too
                    for rows in hidden_TH.split(256):
                        rows @ head_vH.t()
        if not student:
            return
        output = head_loss(
            flat(one(tokens, None, None)),
            one.output_weight(),
            labels_T,
            shard=shard,
            lm_weight_T=ones_T * (0.0 if teacher else 1.0),
            kd=[KD(KDTerm(), DenseTargets(hidden_TH, head_vH), ones_T)] if teacher else [],
        )
        (output.loss / labels_T.numel()).backward()
        for parameter in one.parameters():
            parameter.grad = None

    return step


def _megatron(arguments: argparse.Namespace, *, teacher: bool) -> Callable[[], None]:
    """What a user of megatron-core writes: its GPTModel and local layers, its or modelopt's loss on whole logits."""
    import torch

    groups = _groups()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(sizes: dict[str, int]) -> Any:
        config = TransformerConfig(
            **sizes,
            use_cpu_initialization=True,
            params_dtype=torch.bfloat16,
            bf16=True,
            pipeline_dtype=torch.bfloat16,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=arguments.vocab,
            max_sequence_length=arguments.seq_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pg_collection=groups.collection,
        )
        return model.to(torch.bfloat16)

    criterion: Any = None
    if teacher:
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

        criterion = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False))
    one, other = build(STUDENT), build(TEACHER).eval() if teacher else None
    tokens, labels = _batch(arguments)
    positions = torch.arange(arguments.seq_length).expand(arguments.micro_batch_size, -1)
    mask = torch.triu(torch.ones(1, 1, arguments.seq_length, arguments.seq_length, dtype=torch.bool), 1)

    def step() -> None:
        if other is None:
            loss = one(tokens, positions, mask, labels=labels).mean()
        else:
            with torch.no_grad():
                teacher_logits = other(tokens, positions, mask).transpose(0, 1)
            loss = criterion(one(tokens, positions, mask).transpose(0, 1), teacher_logits)[0].mean()
        loss.backward()
        for parameter in one.parameters():
            parameter.grad = None

    return step


_STEPS: dict[str, Callable[[argparse.Namespace], Callable[[], None]]] = {
    "megakd": _megakd,
    "megatron+modelopt": lambda arguments: _megatron(arguments, teacher=True),
    "megakd LM": lambda arguments: _megakd(arguments, teacher=False),
    "megakd teacher": lambda arguments: _megakd(arguments, student=False),
    "megatron LM": lambda arguments: _megatron(arguments, teacher=False),
}

if __name__ == "__main__":
    main()
