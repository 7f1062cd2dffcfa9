"""Conversion of Hugging Face folders to checkpoints: every number, in every layout, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.folders import CASES, Case, random_tokens, write_folder
from model.huggingface.frozen_logits import frozen_logits, joined
from runs import weights
from worlds import Worlds

from megakd.__main__ import main
from megakd.errors import ExitStatus
from megakd.model.checkpoint.record import read_record

NAMES = ("llama3", "qwen2", "qwen3", "mixtral", "qwen3-moe-normed")
EXPERTS_TP_2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folder and checkpoint of each case."""
    root, made = tmp_path_factory.mktemp("convert"), {}
    for name in NAMES:
        made[name] = root / name, root / f"{name}-checkpoint"
        write_folder(made[name][0], CASES[name])
        assert main(["convert", "--load", str(made[name][0]), "--save", str(made[name][1])]) == ExitStatus.COMPLETE
    return made


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_computes_what_its_folder_does(
    world: Worlds, made: dict[str, tuple[Path, Path]], experts: bool, size: int
) -> None:
    sizes: dict[str, Any] = {} if size == 1 else EXPERTS_TP_2 if experts else {"pipeline_model_parallel_size": 2}
    pairs = [made[name] for name in NAMES if (CASES[name].model_type in ("mixtral", "qwen3_moe")) == experts]
    paths = [str(path) for pair in pairs for path in pair]
    logits = joined(world(size).run(frozen_logits, paths, sizes, random_tokens()[:, :28]))
    for folder, checkpoint in zip(logits[::2], logits[1::2]):
        np.testing.assert_array_equal(folder, checkpoint)


def test_it_is_an_ordinary_checkpoint(made: dict[str, tuple[Path, Path]]) -> None:
    folder, checkpoint = (read_record(path) for path in made["qwen2"])
    assert (checkpoint.form, checkpoint.foreign, checkpoint.checked) == ("torch_dist", True, True)
    assert checkpoint.parents == {"huggingface": folder.fingerprint}
    for field in ("shape", "vocab_size", "seq_length", "tokenizer", "huggingface"):
        assert getattr(checkpoint, field) == getattr(folder, field), field
    assert main(["verify", str(made["qwen2"][1])]) == ExitStatus.COMPLETE


def test_megatrons_own_reader_reads_it(world: Worlds, made: dict[str, tuple[Path, Path]]) -> None:
    """Rows of padding are 0; layers and experts are stacked as megatron-core stacks them."""
    (tensors,) = world(1).run(weights, str(made["mixtral"][1]), 0)
    embedding = np.frombuffer(tensors["embedding.word_embeddings.weight"], np.float32).reshape(256, 24)
    assert embedding[:131].all() and not embedding[131:].any()
    assert len(tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"]) == 4 * (4 * 4 * 80 * 24)
    assert {name.split(".")[0] for name in tensors} == {"embedding", "decoder", "output_layer"}


def test_a_second_call_does_nothing_and_another_model_is_refused(
    made: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = made["llama3"]
    manifest = (checkpoint / "iter_0000000" / "manifest.json").stat().st_mtime_ns
    assert main(["convert", "--load", str(folder), "--save", str(checkpoint)]) == ExitStatus.COMPLETE
    assert "holds this model already" in capsys.readouterr().err
    assert (checkpoint / "iter_0000000" / "manifest.json").stat().st_mtime_ns == manifest
    assert main(["convert", "--load", str(made["qwen3"][0]), "--save", str(checkpoint)]) == ExitStatus.USAGE
    assert "holds checkpoints of another model; give a new folder" in capsys.readouterr().err
    assert main(["convert", "--load", str(folder), "--save", str(checkpoint), "--bf16"]) == ExitStatus.USAGE


def test_what_a_killed_conversion_left_is_no_checkpoint(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    left = tmp_path / "out" / "iter_0000000.partial"
    left.mkdir(parents=True)
    (left / "__0_0.distcp.tmp").write_bytes(b"half")
    assert main(["convert", "--load", str(made["llama3"][0]), "--save", str(tmp_path / "out")]) == ExitStatus.COMPLETE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "iter_0000000", "latest_checkpointed_iteration.txt"
    ]  # fmt: skip
    manifests = [path / "iter_0000000" / "manifest.json" for path in (tmp_path / "out", made["llama3"][1])]
    first, second = (json.loads(path.read_text()) for path in manifests)
    assert first["files"] == second["files"]


def test_refusals(tmp_path: Path, made: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str) -> str:
        assert main(["convert", *flags]) == ExitStatus.USAGE
        return capsys.readouterr().err

    folder = str(made["llama3"][0])
    assert "no such folder" in refused("--load", str(tmp_path / "none"), "--save", str(tmp_path / "o"))
    assert "is the folder of --load" in refused("--load", folder, "--save", folder)
    (tmp_path / "file").write_text("")
    assert "a file; expected a folder" in refused("--load", folder, "--save", str(tmp_path / "file"))


@pytest.mark.long
def test_half_precision(world: Worlds, tmp_path: Path) -> None:
    """bfloat16 stays bfloat16 bit for bit; float16 becomes float32 without loss."""
    import torch

    model = write_folder(tmp_path / "float32", Case("llama"))
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        model.to(dtype).save_pretrained(tmp_path / name)
        assert main(["convert", "--load", str(tmp_path / name), "--save", str(tmp_path / f"{name}-out")]) == 0
        record = read_record(tmp_path / f"{name}-out")
        assert record.shape.bf16 == (name == "bfloat16")
        (tensors,) = world(1).run(weights, str(tmp_path / f"{name}-out"), 0)
        norm = model.state_dict()["model.norm.weight"]
        expected = (norm if name == "bfloat16" else norm.float()).view(torch.uint8).numpy().tobytes()
        assert tensors["decoder.final_layernorm.weight"] == expected
