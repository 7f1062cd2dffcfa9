"""``megakd convert`` of checkpoints to Hugging Face folders: flags, tokenizers, checkpoints of Megatron-LM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from foreign import write_foreign
from model.huggingface.exports import tensors_of
from model.huggingface.folders import CASES, SIZES, write_folder
from runs import make_tree, run_training, write_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from worlds import Worlds

from megakd.__main__ import main
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import ExitStatus
from megakd.model.checkpoint.record import read_record
from megakd.model.checkpoint.tensor_reader import TensorReader
from megakd.model.huggingface.tokenizer_files import _QWEN2_PATTERN, TokenizerFiles, doubt_of_tokenizer
from megakd.pipeline.convert.config import ConvertConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest")


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def write_tokenizer(folder: Path, *, companions: bool = True) -> Path:
    """A tokenizer of 131 words with files of transformers beside it, which hold what no program writes twice."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(130)} | {"<|endoftext|>": 130}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    if companions:
        config = '{"eos_token":   "<|endoftext|>",\n "tokenizer_class": "PreTrainedTokenizerFast", "x": 1}'
        (folder / "tokenizer_config.json").write_text(config)
        (folder / "chat_template.jinja").write_text("{{ messages }}\n")
        (folder / "thesis.tex").write_text("none of it")
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "qwen3"
    write_folder(folder, CASES["qwen3"])
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> dict[str, Path]:
    """A run, and checkpoints of Megatron-LM of its weights."""
    folder = tmp_path_factory.mktemp("run")
    tree = make_tree(
        write_dataset(folder / "data"), training={"train_iters": 1}, checkpoint={"save": str(folder / "run")}
    )
    world(1).run(run_training, tree)
    world(1).run(write_foreign, str(folder / "run"), str(folder))
    (folder / "model.yaml").write_text(yaml.safe_dump(tree["student"]))
    return {path.name: path for path in folder.iterdir()}


def test_there_and_back(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--load", theirs, "--save", tmp_path / "run") == ExitStatus.COMPLETE
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf") == ExitStatus.COMPLETE
    assert "Qwen3ForCausalLM of" in capsys.readouterr().err
    assert tensors_of(tmp_path / "hf") == tensors_of(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (theirs / name).read_bytes()
    assert not (tmp_path / "hf" / "thesis.tex").exists()
    assert main(["verify", str(tmp_path / "hf")]) == ExitStatus.COMPLETE
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf") == ExitStatus.COMPLETE


def test_a_folder_that_is_exported_is_read_as_the_same_model(theirs: Path, tmp_path: Path) -> None:
    convert("--load", theirs, "--save", tmp_path / "run")
    convert("--load", tmp_path / "run", "--save", tmp_path / "hf")
    before, after = read_record(theirs), read_record(tmp_path / "hf")
    for field in ("shape", "vocab_size", "seq_length"):
        assert getattr(before, field) == getattr(after, field), field
    assert before.tokenizer and after.tokenizer and before.tokenizer["hash"] == after.tokenizer["hash"]


def test_the_tokenizer_of_a_run_goes_with_it(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without files of transformers beside it, one is written that adds no id; another tokenizer is refused."""
    folder = tmp_path / "tokenizer"
    bare = tmp_path / "theirs"
    shutil.copytree(theirs, bare)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    convert("--load", bare, "--save", tmp_path / "run")
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf") == ExitStatus.COMPLETE
    text = "w1 w129 w7 nothing"
    loaded, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), build_tokenizer("HuggingFaceTokenizer", bare)
    assert loaded(text)["input_ids"] == ours.encode(text) and set(loaded(text)) == {"input_ids", "attention_mask"}
    shutil.rmtree(bare)
    capsys.readouterr()
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "other") == ExitStatus.USAGE
    assert "--tokenizer-model says where it is now, --no-tokenizer-files exports" in capsys.readouterr().err
    arguments = ("--load", tmp_path / "run", "--save", tmp_path / "other")
    assert convert(*arguments, "--no-tokenizer-files") == ExitStatus.COMPLETE
    words = {f"v{i}": i for i in range(131)}
    folder.mkdir()
    Tokenizer(models.WordLevel(words, unk_token="v0")).save(str(folder / "tokenizer.json"))
    arguments = ("--load", tmp_path / "run", "--save", tmp_path / "third", "--tokenizer-model", folder)
    assert convert(*arguments) == ExitStatus.MISMATCH
    assert "trained with the tokenizer HuggingFaceTokenizer" in capsys.readouterr().err
    write_tokenizer(folder, companions=False)
    assert convert(*arguments) == ExitStatus.COMPLETE


def test_checkpoints_of_megatron_lm(run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--load", run["run"], "--save", tmp_path / "own") == ExitStatus.COMPLETE
    assert "NullTokenizer is a tokenizer that transformers does not have" in capsys.readouterr().err
    for name, more in (("mlm", ()), ("plain", ("--model-config", run["model.yaml"])),
                       ("apart", ("--model-config", run["model.yaml"]))):  # fmt: skip
        arguments = ("--load", run[name], "--save", tmp_path / name, "--max-position-embeddings", 16, *more)
        assert convert(*arguments) == ExitStatus.USAGE
        assert "does not tell how many of them are padding" in capsys.readouterr().err
        assert convert(*arguments, "--vocab-size", 251) == ExitStatus.COMPLETE
        assert tensors_of(tmp_path / name) == tensors_of(tmp_path / "own")
        assert convert(*arguments, "--vocab-size", 253) == ExitStatus.MISMATCH
        capsys.readouterr()


def test_padding_is_cut(run: dict[str, Path], tmp_path: Path) -> None:
    convert("--load", run["run"], "--save", tmp_path / "hf", "--max-shard-size", "100kB")
    rows = TensorReader(read_record(run["run"])).shape("embedding.word_embeddings.weight")[0]
    tensors = tensors_of(tmp_path / "hf")
    assert rows == 252 and tensors["model.embed_tokens.weight"][1] == tensors["lm_head.weight"][1] == (251, 32)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 251
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--load", "HF", "--save", "X", "--saver", "huggingface"], "is a Hugging Face folder already"),
        (["--load", "RUN", "--save", "X", "--saver", "checkpoint"], "is a checkpoint, or none already"),
        (["--load", "HF", "--save", "X", "--dtype", "bfloat16"], "--dtype is for exports"),
        (["--load", "RUN", "--save", "X", "--bf16"], "--dtype bfloat16 is for Hugging Face folders"),
        (["--load", "RUN", "--save", "X", "--max-shard-size", "much"], "expected bytes, as in 500MB"),
        (["--load", "RUN", "--save", "X", "--max-shard-size", "0GB"], "expected bytes, as in 500MB"),
        (["--load", "RUN", "--save", "X", "--ckpt-step", "7"], "whole checkpoints there: iter_0000001"),
        (["--load", "RUN", "--save", "X", "--vocab-size", "250"], "records 251: leave the flag out"),
        (["--load", "RUN", "--save", "HF"], "is no whole export"),
        (["--load", "EMPTY", "--save", "X"], "holds no checkpoint"),
    ],
)
def test_refusals(
    run: dict[str, Path],
    theirs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places: dict[str, Any] = {"HF": theirs, "RUN": run["run"], "X": tmp_path / "x", "EMPTY": tmp_path / "empty"}
    status = convert(*(places.get(argument, argument) for argument in arguments))
    assert status in (ExitStatus.USAGE, ExitStatus.MISMATCH)
    assert words in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("4GiB", 4 * 2**30), ("500 mb", 500 * 10**6),
                                            ("1.5k", 1500), ("12345", 12345), ("7B", 7)])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert ConvertConfig(load="a", save="b", max_shard_size=text).max_shard_bytes == size


def test_a_half_precision_folder_comes_back_in_half_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16 is stored as float32 here; what goes back is float16 again, if nothing is lost by it."""
    model = write_folder(tmp_path / "float32", CASES["qwen3"])
    model.half().save_pretrained(tmp_path / "theirs")
    convert("--load", tmp_path / "theirs", "--save", tmp_path / "run")
    assert TensorReader(read_record(tmp_path / "run")).dtype("embedding.word_embeddings.weight") == torch.float32
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf") == ExitStatus.COMPLETE
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "theirs")
    config = json.loads((tmp_path / "float32" / "config.json").read_text())
    (tmp_path / "float32" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    convert("--load", tmp_path / "float32", "--save", tmp_path / "wide")
    capsys.readouterr()
    assert convert("--load", tmp_path / "wide", "--save", tmp_path / "hf2") == ExitStatus.MISMATCH
    assert "loses digits as float16" in capsys.readouterr().err
    assert convert("--load", tmp_path / "wide", "--save", tmp_path / "hf2", "--dtype", "float32") == ExitStatus.COMPLETE


def test_half_precision_that_cannot_hold_a_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    model = write_folder(folder, CASES["qwen2"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 1e6
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    convert("--load", folder, "--save", tmp_path / "run")
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf", "--dtype", "float16") == ExitStatus.MISMATCH
    assert "model.layers.1.mlp.down_proj.weight has a number of 1e+06" in capsys.readouterr().err
    assert SIZES["vocab_size"] == read_record(tmp_path / "run").vocab_size


def test_a_tokenizer_that_transformers_5_would_take_for_qwens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AutoTokenizer cuts text by Qwen 2's own pattern for every qwen2: told, and the other way to load it is right."""
    folder = tmp_path / "theirs"
    write_folder(folder, CASES["qwen2"])
    write_tokenizer(folder)
    convert("--load", folder, "--save", tmp_path / "run")
    capsys.readouterr()
    assert convert("--load", tmp_path / "run", "--save", tmp_path / "hf") == ExitStatus.COMPLETE
    assert "warning: AutoTokenizer of transformers 5 makes other ids" in capsys.readouterr().err
    ids = build_tokenizer("HuggingFaceTokenizer", folder).encode("w1 w129 w7")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")("w1 w129 w7")["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("w1 w129 w7")["input_ids"] != ids  # else drop the warning
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert doubt_of_tokenizer(TokenizerFiles(None, {"tokenizer.json": folder / "tokenizer.json"}), "qwen2") is None
    assert doubt_of_tokenizer(TokenizerFiles(None), "qwen2") is None
    sentencepiece = doubt_of_tokenizer(TokenizerFiles(None, {"tokenizer.model": folder / "tokenizer.model"}), "llama")
    assert sentencepiece is not None and "transformers 5 converts a sentencepiece model" in sentencepiece
