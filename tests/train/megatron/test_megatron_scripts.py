"""Launch lines of Megatron-LM: every flag gets an answer, and its example scripts run as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron_scripts import GPT3_175B, LLAMA3_8B, MIXTRAL, TRIED
from run_folder.run_folders import write_checkpoint
from runs import run_training, write_dataset
from tokenizer_models import train_byte_bpe
from worlds import Worlds

from megakd.config.tree import list_leaves, parse, to_dict
from megakd.errors import UsageError
from megakd.train.config import TrainConfig
from megakd.train.main import main
from megakd.train.megatron.defaults import DEFAULTS
from megakd.train.megatron.dialect import TABLES, MegatronFlags
from megakd.train.megatron.help import megatron_help
from megakd.train.preflight import check_run

LEAVES = {leaf.flag: leaf for leaf in list_leaves(TrainConfig)}
TINY = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 251"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("megatron") / "data")


def read(words: str | list[str]) -> TrainConfig:
    line = words.split() if isinstance(words, str) else words
    return parse(TrainConfig, line, prog="megakd train", description="", dialect=MegatronFlags())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset of Megatron's own tool, which records nothing, and a tokenizer of its ids."""
    folder = tmp_path_factory.mktemp("foreign")
    prefix = write_dataset(folder / "data")
    Path(f"{prefix}.manifest.json").unlink()
    return prefix, str(train_byte_bpe(folder / "tokenizer"))


def script(text: str, data: str, tmp_path: Path, changes: str = "") -> list[str]:
    """The script's words with paths that are there; later flags of ``changes`` count."""
    paths = {"DATA": data, "RUN": str(tmp_path / "run"), "BOARD": str(tmp_path / "board"), "CACHE": str(tmp_path / "c")}
    return [paths.get(word, word) for word in [*text.split(), *changes.split()]]


def test_gpt3_is_refused_for_what_it_is(data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        read(script(GPT3_175B, data, tmp_path))
    lines = str(refused.value).splitlines()
    (model,) = [line for line in lines if "GPT-3" in line]
    assert all(part in model for part in ("LayerNorm", "GELU", "learned positions", "biases"))
    assert [line.split(":")[0].strip() for line in lines[2:]] == [
        "--fp16",
        "--vocab-file VOCAB",
        "--merge-file MERGES",
    ]
    assert len(lines) == 5


def test_llama3_is_read_as_it_is(foreign: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = script(LLAMA3_8B, foreign[0], tmp_path)
    config = read([foreign[1] if word == "TOKENIZER" else word for word in words])
    assert config.training.train_iters == 1953125000 // 128
    assert config.optim.decoupled_lr == 5e-4 and config.student.fp8_amax_history_len == 1024
    assert not config.parallel.sequence_parallel and config.checkpoint.starts_afresh
    plan = check_run(replace(config, data=replace(config.data, seq_length=16)), 8)
    assert plan.student.ffn_hidden_size == 14336 and not plan.student.tied and plan.valid_blend is not None
    told = capsys.readouterr().err
    for words in ("--sequence-parallel: left out", "--grad-reduce-in-bf16: gradients are reduced in fp32",
                  "--norm-epsilon 1e-06 (Megatron: 1e-05)", "--swiglu", "--help-megatron"):  # fmt: skip
        assert words in told
    assert "--weight-decay 0.1 (" not in told  # given


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (LLAMA3_8B, "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
            "--kv-channels 8 --seq-length 16 --global-batch-size 2 --vocab-size 251 --train-samples 6 "
            "--lr-decay-samples 6 --lr-warmup-samples 2 --eval-iters 1 --tokenizer-type NullTokenizer"),
        (MIXTRAL, "--seq-length 16 --train-iters 2 --eval-iters 1 --expert-model-parallel-size 1 --vocab-size 251 "
            "--tokenizer-type NullTokenizer"),
    ],
    ids=["llama3", "mixtral"],
)  # fmt: skip
def test_scripts_run_in_small(text: str, changes: str, data: str, tmp_path: Path, world: Worlds) -> None:
    words = [word for word in script(text, data, tmp_path, changes) if word != "TOKENIZER"]
    words = [word for word in words if word not in ("--tokenizer-model", "--fp8-param-gather")]
    for flag in ("--fp8-format", "--fp8-amax-history-len", "--wandb-project", "--wandb-exp-name"):  # no GPU, no network
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    assert world(1).run(run_training, to_dict(read(words))) == [0]


def test_every_form_that_was_tried_is_answered(data: str) -> None:
    """Accepted, or refused with a reason; never with another flag's name for a guess."""
    answers: dict[str, str] = {}
    for form in TRIED:
        if form.startswith(("--data-args-path", "--per-split")):
            continue
        words = [*TINY.split(), *(["--data-path", data] if "data-path" not in form else []), *form.split()]
        try:
            read(words)
            answers[form] = ""
        except UsageError as error:
            answers[form] = str(error)
    unknown = {form for form, text in answers.items() if "unknown flag" in text}
    assert unknown == {"--train_iters 5", "--tp-size 2"}
    assert "did you mean '--train-iters'?" in answers["--train_iters 5"]
    assert "did you mean '--tensor-model-parallel-size'?" in answers["--tp-size 2"]
    assert not answers["--swiglu"] and not answers["--add-qkv-bias"] and not answers["--wandb-project p"]
    assert not [form for form, text in answers.items() if "no value follows" in text or "unexpected word" in text]


REFUSED = {
    "--position-embedding-type learned_absolute": "positions are rotary here",
    "--normalization LayerNorm": "LayerNorm is not built here",
    "--optimizer sgd": "the optimizer is Adam",
    "--ckpt-format torch": "checkpoints are torch_dist",
    "--tokenizer-type GPT2BPETokenizer": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
    "--tokenizer-type Llama3Tokenizer": "it is a tiktoken file",
    "--group-query-attention": "say how many: --num-query-groups N",
    "--max-position-embeddings 8 --use-rotary-position-embeddings": "8 positions are fewer than --seq-length 16",
    "--no-load-optim --load x": "weights without the optimizer's state are --finetune",
    "--mock-data": "make a dataset with 'megakd preprocess'",
    "--moe-layer-freq [0]+[1]*3": "every layer has experts here",
    "--rl-anything 1 2": "there is no reinforcement learning here",
    "--num-layers-per-virtual-pipeline-stage 5": "expected a divisor of the layers of a stage",
    "--swiglu=yes": "expected no value: it is a switch",
    "--lr-warmup-samples 5": "say --lr-warmup-iters, or --train-samples",
    "--rampup-batch-size 4 3 10": "does not come to --global-batch-size 8",
    "--split 1,2,3,4": "expected shares of training",
    "--split 0,1": "no share for training",
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_with_the_reason(form: str, data: str) -> None:
    with pytest.raises(UsageError, match=re.escape(REFUSED[form])):
        read(f"{TINY} --data-path {data} {form}")


def test_translated(data: str, tmp_path: Path) -> None:
    (tmp_path / "paths").write_text(f"0.3 {data}\n0.7 {data}\n")
    (tmp_path / "parts.json").write_text(f'{{"train": ["{data}"], "valid": ["{data}"], "test": null}}')
    means: dict[str, dict[str, Any]] = {
        "--num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2 --num-layers 8": {
            "virtual_pipeline_model_parallel_size": 4
        },
        "--num-virtual-stages-per-pipeline-rank 1": {"virtual_pipeline_model_parallel_size": None},
        "--recompute-activations": {"recompute_granularity": "selective"},
        "--use-rope-scaling": {"rope_scaling_factor": 8.0},
        "--use-rope-scaling --rope-scaling-factor 32": {"rope_scaling_factor": 32.0},
        "--num-experts 0": {"num_experts": None},
        "--tokenizer-type Llama2Tokenizer": {"tokenizer_type": "SentencePieceTokenizer"},
        f"--data-args-path {tmp_path / 'paths'}": {"data_path": ["0.3", data, "0.7", data]},
        f"--per-split-data-args-path {tmp_path / 'parts.json'}": {"data_path": [data], "valid_data_path": [data]},
        f"--train-data-path {data}": {"data_path": [data]},
        "--split '99,1,0'": {"split": "'99,1,0'"},
        "--pretrained-checkpoint x": {"load": "x", "finetune": True},
    }
    for words, expected in means.items():
        has_data = any(part in words for part in ("data-args", "train-data"))
        groups = to_dict(read(f"{TINY} {'' if has_data else f'--data-path {data}'} {words}"))
        found = {key: value for group in groups.values() for key, value in group.items()}
        assert {key: found[key] for key in expected} == expected, words


def test_the_table_stands_on_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in (entry for table in TABLES.values() for entry in table):
        assert entry.flag not in LEAVES, f"{entry.flag} is ours"
    flags = [entry.flag for table in TABLES.values() for entry in table]
    assert len(flags) == len(set(flags)) and len(flags) > 300
    for row in DEFAULTS:
        ours = LEAVES[row.flag].default
        assert LEAVES[row.flag].key == row.key
        assert str(ours) == row.ours or ours is None or row.key == "optim.lr", row
    assert main(["--help-megatron"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == megatron_help(list(LEAVES.values()))
    assert all(f"  {flag}" in shown for flag in flags)
    assert max(map(len, shown.splitlines())) <= 125


def test_weights_alone_of_a_run_that_would_go_on(tmp_path: Path) -> None:
    words = f"{TINY} --data-path x --no-load-optim --save {tmp_path / 'run'}"
    assert read(words).checkpoint.save == str(tmp_path / "run")  # nothing is there that could be loaded
    write_checkpoint(tmp_path / "run", 4)
    with pytest.raises(UsageError, match="--no-load-optim: --save .*run holds a run, which goes on with all"):
        read(words)
