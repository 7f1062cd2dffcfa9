"""A small model of text as a checkpoint of ours and as a folder of transformers, with local tasks for lm-eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from runs import make_tree, run_training
from tokenizer_models import text_lines, train_byte_bpe
from worlds import Worlds

SEQ = 48
SHAPE = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "make_vocab_size_divisible_by": 64, "init_method_std": 0.2, "norm_epsilon": 1e-5, "qk_layernorm": False,
}  # fmt: skip


def make_both(folder: Path, world: Worlds) -> None:
    """Write ``run``, a checkpoint that was trained on text, ``hf``, the same weights, and ``tasks``, their task files.

    The tokenizer's own template begins every text with a token, as Llama's does.
    """
    from megakd.data.indexed.writer import IndexedWriter
    from megakd.data.tokenizer import build_tokenizer

    model = train_byte_bpe(folder / "tokenizer")
    content = json.loads((model / "tokenizer.json").read_text())
    begin = {"id": "<|im_end|>", "type_id": 0}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    writer = IndexedWriter(folder / "text", np.uint16)
    for line in text_lines()[:600]:
        if line.strip():
            ids = np.array([*tokenizer.encode(line), tokenizer.eod])
            writer.add_documents(ids, np.array([len(ids)], np.int32))
    writer.finish(parameters={}, parents={}, tokenizer=tokenizer.describe())
    tree = make_tree(
        str(folder / "text"),
        student=SHAPE,
        data={"seq_length": SEQ},
        training={"train_iters": 2},
        optim={"lr": 1e-2},
        checkpoint={"save": str(folder / "run")},
    )
    world(1).run(run_training, tree)
    world(1).run(write_hf_folder, folder)
    write_tasks(folder / "tasks")


def write_hf_folder(folder: Path) -> None:
    """Write the weights of the newest checkpoint of ``run`` as transformers reads a Llama; runs in a world."""
    import torch
    from megatron.core import dist_checkpointing
    from transformers import LlamaConfig, LlamaForCausalLM

    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.record import read_record
    from megakd.parallel import init_parallel

    init_parallel(ParallelConfig(), seed=1)
    record = read_record(str(folder / "run"))
    shape, size = record.shape, record.vocab_size
    config = LlamaConfig(
        vocab_size=size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups, rms_norm_eps=shape.norm_epsilon, tie_word_embeddings=False,
        max_position_embeddings=SEQ, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    tensors = dist_checkpointing.load_plain_tensors(str(record.path))
    ours = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:size],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"][:size],
    }
    groups, width = shape.num_query_groups, shape.kv_channels
    queries = shape.num_attention_heads // groups * width
    for i in range(shape.num_layers):
        layer = {
            name.removeprefix("decoder.layers."): value[i]
            for name, value in ours.items()
            if name.startswith("decoder.layers.")
        }
        qkv = layer["self_attention.linear_qkv.weight"].view(groups, queries + 2 * width, -1)
        gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
        for name, value in (
            ("self_attn.q_proj", qkv[:, :queries].flatten(0, 1)),
            ("self_attn.k_proj", qkv[:, queries : queries + width].flatten(0, 1)),
            ("self_attn.v_proj", qkv[:, queries + width :].flatten(0, 1)),
            ("self_attn.o_proj", layer["self_attention.linear_proj.weight"]),
            ("mlp.gate_proj", gate),
            ("mlp.up_proj", up),
            ("mlp.down_proj", layer["mlp.linear_fc2.weight"]),
            ("input_layernorm", layer["self_attention.linear_qkv.layer_norm_weight"]),
            ("post_attention_layernorm", layer["mlp.linear_fc1.layer_norm_weight"]),
        ):
            theirs[f"model.layers.{i}.{name}.weight"] = value
    model = LlamaForCausalLM(config)
    model.load_state_dict(theirs, strict=True)
    model.save_pretrained(folder / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tokenizer" / name, folder / "hf" / name)


def write_tasks(folder: Path) -> None:
    """Write task files in lm-eval's own form, over local data: two of choices, one continuation, one rolling.

    Contexts are shorter and longer than the model's input, end in blanks, or are empty; continuations have one token
    and many, and characters of several bytes.
    """
    folder.mkdir()
    lines = [line for line in text_lines() if len(line.split()) > 5]
    choices, words, texts = [], [], []
    for i in range(24):
        text = " ".join(lines[3 * i : 3 * i + (1, 2, 9)[i % 3]])
        endings = [f"{lines[100 + 7 * i][:20].strip()}{'é' * (i % 4)}", "the", f"of {i}", lines[200 + i].strip()[:60]]
        choices.append(
            {"q": "" if i % 12 == 5 else text + " " * (i % 3), "choices": endings[: 2 + i % 3], "answer": i % 2}
        )
        words.append({"text": text})
        texts.append({"text": text, "id": i})
    for name, rows in (("choices", choices), ("words", words), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracies = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    common = {"doc_to_text": "{{q}}", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}"}
    tasks: dict[str, dict[str, Any]] = {
        "local_choices": {"output_type": "multiple_choice", "metric_list": accuracies, **common},
        "local_shots": {
            "output_type": "multiple_choice", "metric_list": accuracies[:1], "fewshot_split": "test",
            "num_fewshot": 1, **common,
        },
        "local_words": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                            accuracies[0]],
        },
        "local_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        kind = name.removeprefix("local_").replace("shots", "choices")
        body = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{kind}.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(body))  # JSON is YAML


def samples_of_hf(folder: Path, tasks: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The samples and the results of lm-eval's own back-end on ``hf``; runs in a world."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder / "hf"), max_length=SEQ, device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=10, log_samples=True)
    assert found is not None
    return json.loads(json.dumps(found["samples"], default=str)), dict(found["results"])
