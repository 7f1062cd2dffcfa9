"""Suggestions for an unknown name, made only where there is little doubt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

# Names that other trainers use for a thing, and that thing's name here (Megatron's, without dashes).
SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "learning-rate": "lr", "max-lr": "lr", "peak-lr": "lr", "base-lr": "lr", "lr-max": "lr",
        "lr-min": "min-lr", "min-learning-rate": "min-lr", "final-lr": "min-lr", "end-lr": "min-lr",
        "lr-scheduler": "lr-decay-style", "lr-scheduler-type": "lr-decay-style", "lr-schedule": "lr-decay-style",
        "scheduler": "lr-decay-style", "decay-style": "lr-decay-style",
        "warmup": "lr-warmup-iters", "warmup-iters": "lr-warmup-iters", "warmup-steps": "lr-warmup-iters",
        "num-warmup-steps": "lr-warmup-iters", "lr-warmup-steps": "lr-warmup-iters",
        "warmup-samples": "lr-warmup-samples", "warmup-ratio": "lr-warmup-fraction",
        "warmup-fraction": "lr-warmup-fraction", "lr-decay-steps": "lr-decay-iters", "decay-iters": "lr-decay-iters",
        "wd": "weight-decay", "beta1": "adam-beta1", "beta2": "adam-beta2", "adam-epsilon": "adam-eps",
        "grad-clip": "clip-grad", "gradient-clipping": "clip-grad", "gradient-clip": "clip-grad",
        "max-grad-norm": "clip-grad", "clip-grad-norm": "clip-grad", "gradient-clip-val": "clip-grad",
        "steps": "train-iters", "max-steps": "train-iters", "num-steps": "train-iters", "train-steps": "train-iters",
        "num-train-steps": "train-iters", "total-steps": "train-iters", "max-iters": "train-iters",
        "iters": "train-iters", "num-iters": "train-iters", "iterations": "train-iters",
        "training-steps": "train-iters", "max-train-steps": "train-iters",
        "batch-size": "micro-batch-size", "mbs": "micro-batch-size", "per-device-train-batch-size": "micro-batch-size",
        "per-device-batch-size": "micro-batch-size", "microbatch-size": "micro-batch-size",
        "gbs": "global-batch-size", "train-batch-size": "global-batch-size",
        "layers": "num-layers", "n-layers": "num-layers", "n-layer": "num-layers", "num-hidden-layers": "num-layers",
        "depth": "num-layers", "encoder-num-layers": "num-layers", "decoder-num-layers": "num-layers",
        "d-model": "hidden-size", "dim": "hidden-size", "hidden-dim": "hidden-size", "n-embd": "hidden-size",
        "embed-dim": "hidden-size", "hidden": "hidden-size",
        "intermediate-size": "ffn-hidden-size", "d-ff": "ffn-hidden-size", "ffn-size": "ffn-hidden-size",
        "heads": "num-attention-heads", "num-heads": "num-attention-heads", "n-heads": "num-attention-heads",
        "n-head": "num-attention-heads", "num-key-value-heads": "num-query-groups", "num-kv-heads": "num-query-groups",
        "n-kv-heads": "num-query-groups", "head-dim": "kv-channels", "rms-norm-eps": "norm-epsilon",
        "layernorm-epsilon": "norm-epsilon", "norm-eps": "norm-epsilon", "rope-theta": "rotary-base",
        "rope-base": "rotary-base",
        "max-seq-length": "seq-length", "seq-len": "seq-length", "sequence-length": "seq-length",
        "context-length": "seq-length", "block-size": "seq-length", "max-length": "seq-length",
        "max-seq-len": "seq-length", "encoder-seq-length": "seq-length", "ctx-len": "seq-length",
        "tp": "tensor-model-parallel-size", "tp-size": "tensor-model-parallel-size",
        "tensor-parallel-size": "tensor-model-parallel-size", "model-parallel-size": "tensor-model-parallel-size",
        "tensor-parallel": "tensor-model-parallel-size", "target-tensor-parallel-size": "tensor-model-parallel-size",
        "pp": "pipeline-model-parallel-size", "pp-size": "pipeline-model-parallel-size",
        "pipeline-parallel-size": "pipeline-model-parallel-size", "pipeline-parallel": "pipeline-model-parallel-size",
        "vpp": "virtual-pipeline-model-parallel-size", "vpp-size": "virtual-pipeline-model-parallel-size",
        "cp": "context-parallel-size", "cp-size": "context-parallel-size",
        "context-model-parallel-size": "context-parallel-size",
        "ep": "expert-model-parallel-size", "ep-size": "expert-model-parallel-size",
        "expert-parallel-size": "expert-model-parallel-size", "etp": "expert-tensor-parallel-size",
        "etp-size": "expert-tensor-parallel-size", "sp": "sequence-parallel", "zero": "use-distributed-optimizer",
        "data": "data-path", "dataset": "data-path", "train-data": "data-path", "train-file": "data-path",
        "dataset-path": "data-path", "data-dir": "data-path", "data-prefix": "data-path",
        "valid-data": "valid-data-path", "val-data-path": "valid-data-path", "eval-data-path": "valid-data-path",
        "validation-data": "valid-data-path", "validation-data-path": "valid-data-path", "val-data": "valid-data-path",
        "tokenizer": "tokenizer-model", "tokenizer-path": "tokenizer-model",
        "tokenizer-name-or-path": "tokenizer-model",
        "output-dir": "save", "save-dir": "save", "save-path": "save", "checkpoint-dir": "save", "ckpt-dir": "save",
        "out-dir": "save", "resume": "load", "resume-from-checkpoint": "load", "load-dir": "load",
        "load-path": "load", "init-from": "load", "save-every": "save-interval",
        "save-steps": "save-interval", "save-iters": "save-interval", "eval-every": "eval-interval",
        "eval-steps": "eval-interval", "val-interval": "eval-interval", "eval-batches": "eval-iters",
        "log-every": "log-interval", "logging-steps": "log-interval", "log-iters": "log-interval",
        "mixed-precision": "bf16", "bfloat16": "bf16", "tensorboard": "tensorboard-dir",
        "experts": "num-experts", "n-experts": "num-experts", "num-moe-experts": "num-experts",
        "topk": "moe-router-topk",
        "gradient-checkpointing": "recompute-granularity", "activation-checkpointing": "recompute-granularity",
        "teacher": "teacher-load", "teacher-model": "teacher-load", "teacher-path": "teacher-load",
        "teacher-checkpoint": "teacher-load", "alpha": "kd-alpha", "temperature": "kd-temperature",
        "kd-temp": "kd-temperature", "kd-loss": "kd-divergence", "kd-weight": "kd-alpha", "divergence": "kd-divergence",
        "logits-dir": "logits-load-dir", "wandb-name": "wandb-exp-name", "wandb-run-name": "wandb-exp-name",
    }
)  # fmt: skip


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that ``name`` is a synonym or a slip of: at most two, equally near; none if in doubt.

    A slip is another dash, underscore or case, or one letter added, left out, changed or swapped with its neighbour
    (two where the name has twelve or more).
    """
    asked = _bare(name)
    by_bare: dict[str, list[str]] = {}
    for candidate in known:
        by_bare.setdefault(_bare(candidate), []).append(candidate)
    same = [full for bare, names in by_bare.items() if _letters(bare) == _letters(asked) for full in names]
    if same:
        return same[:2]
    if asked in SYNONYMS and SYNONYMS[asked] in by_bare:
        return by_bare[SYNONYMS[asked]][:2]
    least = 2 if len(_letters(asked)) >= 12 else 1
    nearest: list[str] = []
    for bare, names in by_bare.items():
        distance = _slips(_letters(asked), _letters(bare), least)
        if distance is None or len(_letters(bare)) < 2:
            continue
        nearest = names if distance < least else [*nearest, *names]
        least = distance
    return nearest if len(nearest) <= 2 else []


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x' or 'y'?``, or an empty text if no known name is near."""
    near = near_names(name, known)
    return f"; did you mean {' or '.join(repr(candidate) for candidate in near)}?" if near else ""


def _bare(name: str) -> str:
    """Return a flag without dashes in front, or the last part of a place in the tree, spelled like a flag."""
    return name.lstrip("-").rsplit(".", 1)[-1].replace("_", "-").lower()


def _letters(bare: str) -> str:
    return bare.replace("-", "")


def _slips(word: str, known: str, most: int) -> int | None:
    """Count letters added, left out, changed or swapped with a neighbour; None if there are more than ``most``."""
    if abs(len(word) - len(known)) > most:
        return None
    before: list[int] = []
    row = list(range(len(known) + 1))
    for i, letter in enumerate(word, 1):
        above, before_above = row, before
        row = [i]
        for j, against in enumerate(known, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != against))
            if before_above and j > 1 and letter == known[j - 2] and word[i - 2] == against:
                cost = min(cost, before_above[j - 2] + 1)
            row.append(cost)
        before = above
    return row[-1] if row[-1] <= most else None
