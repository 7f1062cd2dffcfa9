"""Teachers to prune, runs of the verb, and the slow obvious way to importance and to a student. Runs in a world."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megakd.data.indexed.dataset import IndexedDataset
from megakd.model.checkpoint.record import read_record

SEQ = 16
LAYER = "decoder.layers."
QKV, PROJ = f"{LAYER}self_attention.linear_qkv.weight", f"{LAYER}self_attention.linear_proj.weight"
BIAS, NORM1 = f"{LAYER}self_attention.linear_qkv.bias", f"{LAYER}self_attention.linear_qkv.layer_norm_weight"
FC1, FC2, NORM2 = (
    f"{LAYER}mlp.linear_fc1.weight",
    f"{LAYER}mlp.linear_fc2.weight",
    f"{LAYER}mlp.linear_fc1.layer_norm_weight",
)
QNORM, KNORM = f"{LAYER}self_attention.q_layernorm.weight", f"{LAYER}self_attention.k_layernorm.weight"
EMBEDDING, HEAD, FINAL = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"


def tensors(folder: str) -> dict[str, np.ndarray]:
    """Weights of a checkpoint by name, layers stacked, without the optimizer's state."""
    import torch

    from megakd.layout import ParallelConfig
    from megakd.parallel import init_parallel

    init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(read_record(folder).path))
    return {
        key: value.numpy()
        for key, value in loaded.items()
        if isinstance(value, torch.Tensor) and key.startswith(("decoder.", "embedding.", "output_layer."))
    }


def prune(*argv: str) -> tuple[int, str, str]:
    """Exit status and what the verb prints."""
    from megakd.__main__ import run
    from megakd.pipeline.prune.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run(main, argv)
    return status, out.getvalue(), err.getvalue()


def plant(load: str, save: str, plants: Sequence[tuple[str, int, int]]) -> None:
    """Write a copy of a teacher in which parts are dead.

    plants: what is dead, the layer, and its number: ``layer``, ``group`` (values), ``neuron`` or ``channel``.
    """
    import torch

    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.checkpoint.save import CheckpointWriter, record_parameters
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    record = read_record(load)
    shape = record.shape
    groups = init_parallel(ParallelConfig(), seed=1)
    chunks = build_model(shape, groups, vocab_size=record.vocab_size, seq_length=SEQ)
    load_weights(record, chunks, groups)
    layers = chunks[0].decoder.layers
    with torch.no_grad():
        for kind, number, part in plants:
            attention, mlp = layers[number].self_attention, layers[number].mlp
            if kind == "layer":
                attention.linear_proj.weight.zero_()
                mlp.linear_fc2.weight.zero_()
            elif kind == "group":
                shared = shape.num_attention_heads // shape.num_query_groups
                for weight in (attention.linear_qkv.weight, attention.linear_qkv.bias):
                    weight.unflatten(0, (shape.num_query_groups, shared + 2, -1))[part, -1] = 0
            elif kind == "neuron":
                mlp.linear_fc1.weight[shape.ffn_hidden_size + part] = 0
            else:
                chunks[0].embedding.word_embeddings.weight[:, part] = 0
                for layer in layers:
                    layer.self_attention.linear_proj.weight[part] = 0
                    layer.mlp.linear_fc2.weight[part] = 0
    parameters = record_parameters(
        shape, groups, iteration=0, vocab_size=record.vocab_size, seq_length=SEQ, loader_state={}, objective_state={}
    )
    CheckpointWriter(save, background=False).save_weights(
        0, chunks, groups, parameters=parameters, parents={}, tokenizer=record.tokenizer
    )


class Twin:
    """A teacher in float64 numpy, one sample at a time, that remembers what it saw."""

    def __init__(self, weights: dict[str, np.ndarray], record: Any) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.shape, self.vocab_size = record.shape, record.vocab_size
        self.cosines: list[list[float]] = [[] for _ in range(self.shape.num_layers)]
        self.heads: list[Any] = []
        self.neurons: list[Any] = []
        self.norms: list[Any] = []

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.shape.norm_epsilon) * weight  # type: ignore[no-any-return]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions of ``[S, D]``."""
        half = x.shape[1] // 2
        turns = np.arange(len(x))[:, None] / self.shape.rotary_base ** (np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * np.cos(turns) - b * np.sin(turns), b * np.cos(turns) + a * np.sin(turns)], 1)

    def run(self, tokens: np.ndarray) -> float:
        """Mean loss of one sample of ``S + 1`` tokens, in nats."""
        w, shape = self.weights, self.shape
        shared = shape.num_attention_heads // shape.num_query_groups
        x = w[EMBEDDING][tokens[:-1]]
        heads, neurons, norms = list[Any](), list[Any](), list[Any]()
        for layer in range(shape.num_layers):
            entering = x
            inner = self.norm(x, w[NORM1][layer])
            norms.append(np.abs(inner).mean(0))
            qkv = inner @ w[QKV][layer].T + w[BIAS][layer]
            blocks = qkv.reshape(len(x), shape.num_query_groups, shared + 2, shape.kv_channels)
            outputs = []
            for head in range(shape.num_attention_heads):
                block = blocks[:, head // shared]
                query = self.rotate(self.norm(block[:, head % shared], w[QNORM][layer]))
                key = self.rotate(self.norm(block[:, shared], w[KNORM][layer]))
                scores = query @ key.T / np.sqrt(shape.kv_channels)
                scores[np.triu_indices(len(x), 1)] = -np.inf
                scores = np.exp(scores - scores.max(1, keepdims=True))
                outputs.append(scores / scores.sum(1, keepdims=True) @ block[:, shared + 1])
            heads.append([np.linalg.norm(output, axis=1).mean() for output in outputs])
            x = x + np.concatenate(outputs, 1) @ w[PROJ][layer].T
            inner = self.norm(x, w[NORM2][layer])
            norms.append(np.abs(inner).mean(0))
            gate, up = np.split(inner @ w[FC1][layer].T, 2, axis=1)
            active = gate / (1 + np.exp(-gate)) * up
            neurons.append(np.abs(active).mean(0))
            x = x + active @ w[FC2][layer].T
            lengths = np.linalg.norm(entering, axis=1) * np.linalg.norm(x, axis=1)
            self.cosines[layer] += ((entering * x).sum(1) / lengths).tolist()
        self.heads.append(heads)
        self.neurons.append(neurons)
        self.norms.append(norms)
        logits = (self.norm(x, w[FINAL]) @ w.get(HEAD, w[EMBEDDING]).T)[:, : self.vocab_size]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-log_p[np.arange(len(x)), tokens[1:]].mean())


def twin_of(load: str, data: str, ids: list[int]) -> dict[str, Any]:
    """Loss and importance by the twin, with the default aggregation."""
    twin = Twin(tensors(load), read_record(load))
    stream = IndexedDataset(data).tokens
    losses = [twin.run(stream[i * SEQ : i * SEQ + SEQ + 1].astype(np.int64)) for i in ids]
    root = [np.sqrt((np.array(values) ** 2).sum(0)) for values in (twin.heads, twin.neurons, twin.norms)]
    influence = [1 - np.mean(cosines) for cosines in twin.cosines]
    return {
        "loss": np.mean(losses), "influence": influence, "heads": root[0], "neurons": root[1],
        "channels": root[2].sum(0),
    }  # fmt: skip


def cut_by_hand(weights: dict[str, np.ndarray], record: Any, report: dict[str, Any], neurons: Any) -> dict[str, Any]:
    """Weights of the student: rows and columns of each tensor taken one by one, in loops."""
    shape, channels = record.shape, report["channels"]
    shared, width = shape.num_attention_heads // shape.num_query_groups, shape.kv_channels
    scale = np.float32(np.sqrt(shape.hidden_size / len(channels)))
    student: dict[str, Any] = {name: [] for name in weights if name.startswith(LAYER)}
    for place, layer in enumerate(report["layers"]):
        heads = report["heads"][place]
        rows: list[int] = []
        for group in sorted({head // shared for head in heads}):
            start = group * (shared + 2) * width
            for head in [head for head in heads if head // shared == group]:
                rows += range(start + head % shared * width, start + (head % shared + 1) * width)
            rows += range(start + shared * width, start + (shared + 2) * width)
        columns = [head * width + i for head in heads for i in range(width)]
        up = [shape.ffn_hidden_size + neuron for neuron in neurons[place]]
        student[QKV].append(weights[QKV][layer][np.ix_(rows, channels)])
        student[BIAS].append(weights[BIAS][layer][rows])
        student[PROJ].append(weights[PROJ][layer][np.ix_(channels, columns)])
        student[FC1].append(weights[FC1][layer][np.ix_([*neurons[place], *up], channels)])
        student[FC2].append(weights[FC2][layer][np.ix_(channels, neurons[place])])
        for name in (NORM1, NORM2):
            student[name].append(weights[name][layer][channels] * scale)
        for name in (QNORM, KNORM):
            student[name].append(weights[name][layer])
    whole = {name: np.stack(values) for name, values in student.items()}
    for name in (EMBEDDING, HEAD):
        if name in weights:
            whole[name] = weights[name][:, channels]
    return whole | {FINAL: weights[FINAL][channels] * scale}


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "prune.json").read_text())
    return report
