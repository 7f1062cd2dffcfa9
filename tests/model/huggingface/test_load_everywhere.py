"""A Hugging Face folder as ``--load`` and ``--teacher-load`` of every verb, without a conversion."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.folders import Case, write_folder
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.config.tree import from_dict, validate
from megakd.data.scores.artefact import Scores
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import read_record
from megakd.train.config import TrainConfig
from megakd.train.preflight import check_run

IDS, ROWS, SEQ = 251, 259, 16


def write_tokenizer(folder: Path, num_ids: int = IDS) -> None:
    """A tokenizer of words, two of which could end a document."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(num_ids - 2)} | {"<|im_end|>": num_ids - 2, "<|endoftext|>": num_ids - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>"), AddedToken("<|endoftext|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of a teacher and of a smaller model, and a dataset of their tokenizer with another end of documents."""
    root = tmp_path_factory.mktemp("everywhere")
    made: dict[str, Any] = {"root": root, "teacher": root / "teacher", "small": root / "small"}
    made["model"] = write_folder(made["teacher"], Case("qwen2", 4, {"vocab_size": ROWS, "tie_word_embeddings": True}))
    small = Case("qwen3", 5, {"vocab_size": ROWS, "num_hidden_layers": 2, "head_dim": 6})
    write_folder(made["small"], small, seed=2)
    for folder in (made["teacher"], made["small"]):
        write_tokenizer(folder)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", made["teacher"], eod_token="<|endoftext|>")
    made["data"] = write_dataset(root / "data", tokenizer=tokenizer.describe())
    return made


def config_of(tree: dict[str, Any]) -> TrainConfig:
    config = from_dict(TrainConfig, tree)
    validate(config)
    return config.resolved()


def start_tree(made: dict[str, Any], **groups: dict[str, Any]) -> dict[str, Any]:
    tree = make_tree(made["data"], **{"checkpoint": {"load": str(made["teacher"]), "finetune": True}, **groups})
    tree["student"] = dict(groups.get("student", {}))
    return tree


def first_losses(tree: dict[str, Any]) -> dict[str, Any]:
    """Loss of the first step, with its tokens, labels and mask on this rank."""
    from runs import one_step

    from megakd.parallel import init_parallel
    from megakd.train.build import build_loader

    result = one_step(tree)
    config = config_of(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    batch = next(build_loader(config.data, config.training, plan, init_parallel(config.parallel, seed=1)))
    parts = [batch.microbatch(i) for i in range(batch.num_microbatches)]
    return result | {"tokens_BS": np.concatenate([part.tokens_BS for part in parts]),
                     "labels_BS": np.concatenate([part.labels_BS for part in parts]),
                     "vocab_size": plan.vocab_size, "parents": plan.parents}  # fmt: skip


@pytest.mark.slow
def test_finetuning_starts_from_the_weights_of_a_folder(world: Worlds, made: dict[str, Any]) -> None:
    """The first loss is that of transformers over the tokenizer's ids; rows of padding take no part in it."""
    import torch

    (alone,) = world(1).run(first_losses, start_tree(made))
    assert alone["vocab_size"] == IDS
    with torch.no_grad():
        logits = made["model"](torch.from_numpy(alone["tokens_BS"])).logits[..., :IDS]
    labels = torch.from_numpy(alone["labels_BS"])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert alone["lm"] == pytest.approx(expected, rel=1e-5)
    split = world(2).run(first_losses, start_tree(made, parallel={"tensor_model_parallel_size": 2}))[-1]
    assert split["lm"] == pytest.approx(alone["lm"], rel=1e-5)
    assert split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.long
def test_a_run_from_a_folder_resumes_and_its_model_is_recorded(world: Worlds, made: dict[str, Any]) -> None:
    save = str(made["root"] / "run")
    tree = start_tree(made, training={"train_iters": 2}, checkpoint={"load": str(made["teacher"]), "finetune": True,
                      "save": save})  # fmt: skip
    assert world(1).run(run_training, tree) == [0]
    record, folder = read_record(save), read_record(made["teacher"])
    assert record.shape == folder.shape and record.vocab_size == IDS
    tree["training"]["train_iters"] = 3
    assert world(1).run(run_training, tree) == [0]
    assert read_record(save).iteration == 3


def test_flags_that_describe_another_model_are_refused(made: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--norm-epsilon is 0.1, and the model is that of .*teacher, whose"):
        check_run(config_of(start_tree(made, student={"norm_epsilon": 0.1})), 1)
    tree = start_tree(made)
    tree["student"] = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 6}
    with pytest.raises(MismatchError, match="holds another model than is asked for: ffn_hidden_size: 40 there"):
        check_run(config_of(tree), 1)
    assert check_run(config_of(start_tree(made, student={"bf16": True})), 1).student.bf16
    tree = start_tree(made, checkpoint={"load": str(made["teacher"])})
    with pytest.raises(MismatchError, match=rf"no run to continue; .*--load {made['teacher']} --finetune"):
        check_run(config_of(tree), 1)
    tree = make_tree(made["data"])
    tree["student"] = {}
    with pytest.raises(UsageError, match="missing --num-layers, .*--load DIR --finetune"):
        check_run(config_of(tree), 1)


@pytest.mark.slow
def test_a_folder_as_teacher(world: Worlds, made: dict[str, Any]) -> None:
    tree = make_tree(made["data"], teacher={"load": str(made["teacher"])}, objective={"kd_alpha": 0.5})
    (alone,) = world(1).run(first_losses, tree)
    assert alone["parents"]["teacher"] == read_record(made["teacher"]).fingerprint
    tree["parallel"] = {"tensor_model_parallel_size": 2}
    split = world(2).run(first_losses, tree)[0]
    assert split["kd"] == pytest.approx(alone["kd"], rel=1e-5) and alone["kd"] > 0


def test_a_teacher_of_another_tokenizer_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    """Another end of documents is no other tokenizer; another word is."""
    tree = make_tree(made["data"], teacher={"load": str(made["teacher"])})
    plan = check_run(config_of(tree), 1)
    assert plan.tokenizer is not None and plan.tokenizer["eod"] == IDS - 1
    other = Path(shutil.copytree(made["teacher"], tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w7"', '"w_7"'))
    tree["teacher"] = {"load": str(other)}
    with pytest.raises(MismatchError, match=r"different tokenizers: .*the teacher .*other has HuggingFaceTokenizer"):
        check_run(config_of(tree), 1)


def test_samples_beyond_a_sliding_window_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    write_folder(folder, Case("mistral", keys={"vocab_size": ROWS, "sliding_window": 15}))
    write_tokenizer(folder)
    tree = make_tree(made["data"], teacher={"load": str(folder)})
    with pytest.raises(UsageError, match=r"teacher .*mistral: sequences of 16 tokens, .* window of 15"):
        check_run(config_of(tree), 1)
    from megakd.pipeline.score.preflight import ScoreConfig, check_score

    values = {"load": str(folder), "data_path": made["data"], "seq_length": SEQ, "output": str(tmp_path / "s")}
    config = from_dict(ScoreConfig, values)
    validate(config)
    with pytest.raises(UsageError, match="window of 15"):
        check_score(config, 1)


def run_verbs(lines: list[tuple[str, list[str]]]) -> list[int]:
    """Exit statuses of verbs, one after the other, in a world."""
    from megakd.__main__ import run
    from megakd.pipeline.capture import main as capture
    from megakd.pipeline.proxy import main as proxy
    from megakd.pipeline.score import main as score

    verbs = {"proxy": proxy.main, "score": score.main, "capture": capture.main}
    return [run(verbs[verb], argv) for verb, argv in lines]


@pytest.mark.slow
def test_score_capture_and_proxy(world: Worlds, made: dict[str, Any], tmp_path: Path) -> None:
    """Scores are transformers' log-probabilities of the labels, and manifests name the folder's fingerprint."""
    import torch

    data = ["--data-path", made["data"], "--seq-length", str(SEQ)]
    teacher, small = str(made["teacher"]), str(made["small"])
    some = ["--sample-fraction", "0.3"]
    lines = [
        ("score", ["--load", teacher, *data, "--output", str(tmp_path / "all")]),
        ("score", ["--load", teacher, *data, *some, "--output", str(tmp_path / "t")]),
        ("score", ["--load", small, *data, *some, "--output", str(tmp_path / "r")]),
        ("capture", ["--load", teacher, *data, "--output", str(tmp_path / "store")]),
        ("proxy", ["--load", small, *data, "--teacher-scores", str(tmp_path / "t"), "--reference-scores",
                   str(tmp_path / "r"), "--output", str(tmp_path / "proxy"), "--epochs", "1"]),
    ]  # fmt: skip
    assert world(1).run(run_verbs, lines) == [[0] * len(lines)]
    scores = Scores(tmp_path / "all")
    assert scores.manifest.parents["model"] == read_record(teacher).fingerprint
    from megakd.data.indexed.dataset import IndexedDataset
    from megakd.data.samples.concat import ConcatSamples

    samples = ConcatSamples(IndexedDataset(made["data"]), SEQ)
    tokens = torch.from_numpy(samples.read(np.arange(50)).astype(np.int64))
    with torch.no_grad():
        log_probs = made["model"](tokens[:, :SEQ]).logits[..., :IDS].log_softmax(-1)
    expected = log_probs.gather(-1, tokens[:, 1 : SEQ + 1, None]).sum((1, 2)).numpy()
    np.testing.assert_allclose(scores.log_probs[:50], expected, rtol=1e-5)
