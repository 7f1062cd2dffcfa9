"""Small training runs for tests: a dataset, a configuration tree, one step, a whole run and what it left."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megakd.config.tree import from_dict, validate
from megakd.data.indexed.writer import IndexedWriter
from megakd.data.loader import Loader
from megakd.train.config import TrainConfig
from megakd.train.preflight import Plan, check_run

if TYPE_CHECKING:
    from megakd.parallel import Groups
    from megakd.teachers.protocol import Teacher
    from megakd.train.objective.objective import Objective
    from megakd.train.optim import Student

VOCAB = 251
TOKENIZER = {"type": "NullTokenizer", "hash": "0" * 32, "vocab_size": VOCAB, "eod": VOCAB - 1, "path": None}


def write_dataset(prefix: Path, *, num_tokens: int = 6000, seed: int = 0, tokenizer: dict[str, Any] = TOKENIZER) -> str:
    """Learnable text: arithmetic progressions modulo the vocabulary, in documents of 50 tokens."""
    rng = np.random.default_rng(seed)
    starts, strides = rng.integers(0, VOCAB, num_tokens // 50), rng.integers(1, 4, num_tokens // 50)
    tokens = (starts[:, None] + strides[:, None] * np.arange(50)) % VOCAB
    writer = IndexedWriter(prefix, np.uint16)
    writer.add_documents(tokens.reshape(-1), np.full(len(tokens), 50, np.int32))
    writer.finish(parameters={}, parents={}, tokenizer=tokenizer)
    return str(prefix)


def make_tree(data: str, /, **overrides: dict[str, Any]) -> dict[str, Any]:
    """A configuration tree of a tiny student; overrides are merged group by group."""
    tree: dict[str, Any] = {
        "training": {"train_iters": 4, "micro_batch_size": 2, "global_batch_size": 8, "seed": 5},
        "student": {
            "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4,
            "qk_layernorm": True, "make_vocab_size_divisible_by": 4,
        },
        "data": {"data_path": [data], "seq_length": 16},
        "optim": {"lr": 3e-3},
        "logging": {"log_interval": 1000},
    }  # fmt: skip
    for group, values in overrides.items():
        tree.setdefault(group, {}).update(values)
    return copy.deepcopy(tree)


def make_config(tree: dict[str, Any]) -> TrainConfig:
    config = from_dict(TrainConfig, tree)
    validate(config)
    return config.resolved()


def run_training(tree: dict[str, Any]) -> int:
    """A whole run in a world; the exit status."""
    from megakd.train.loop import train

    config = make_config(tree)
    return int(train(config, check_run(config, int(os.environ["WORLD_SIZE"]))))


def output_of_training(tree: dict[str, Any]) -> str:
    """What a whole run prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_training(tree) == 0
    return printed.getvalue()


def build_parts(config: TrainConfig, plan: Plan, groups: Groups) -> tuple[Student, Teacher, Objective, Loader]:
    """The parts of a run that a step is made from, as the training loop builds them."""
    from megakd.train.build import build_loader, build_objective, build_student, build_teacher

    return (
        build_student(config.training, plan, groups),
        build_teacher(config.teacher, config.objective, plan, groups),
        build_objective(config.objective, config.kd_schedule(), plan, groups, train_iters=config.training.train_iters),
        build_loader(config.data, config.training, plan, groups),
    )


def one_step(tree: dict[str, Any], forward_only: bool = False) -> dict[str, Any]:
    """The first step of a run: losses and gradient norm, before any update."""
    from megakd.parallel import init_parallel
    from megakd.teachers.protocol import NoTeacher
    from megakd.train.optim import Optimizer
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    groups = init_parallel(config.parallel, seed=config.training.seed)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    objective = objective.at(1)
    optimizer = Optimizer(config.optim, student, train_iters=config.training.train_iters)
    optimizer.zero_grad()
    asked = teacher if objective.needs_teacher else NoTeacher()
    loss = run_step(student, next(batches), asked, objective, groups, step=1, forward_only=forward_only)
    result = {"loss": loss.loss, "lm": loss.lm, "kd": loss.kd, "agreement": loss.agreement, "tokens": loss.num_tokens}
    result["modelled_share"] = loss.modelled_share
    result |= {"entropy": loss.teacher_entropy, "z_loss": loss.z_loss, "kd_share": loss.kd_share, "t": loss.taid_t}
    if loss.stored_share is not None:
        result["stored_share"] = loss.stored_share
    if not forward_only:
        optimizer.inner.prepare_grads()
        result["grad_norm"] = float(optimizer.inner.get_grad_norm())
    return result


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step in a run's record."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records if "loss" in record}


def weights(folder: str, iteration: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as bytes; runs in a world."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.record import checkpoint_path
    from megakd.parallel import init_parallel

    init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing
    from torch import Tensor, uint8

    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint_path(folder, iteration)))
    return {
        key: value.contiguous().view(-1).view(uint8).numpy().tobytes()  # numpy knows no bfloat16
        for key, value in tensors.items()
        if isinstance(value, Tensor)
    }
