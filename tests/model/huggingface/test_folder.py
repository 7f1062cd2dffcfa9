"""Folders with a fault are refused, by the name of what is wrong; whole ones are described as checkpoints are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.folders import Case, write_folder
from safetensors.numpy import load_file, save_file

from megakd.__main__ import main
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.model.checkpoint.record import read_record
from megakd.model.huggingface.folder import describe_folder, open_folder
from megakd.model.huggingface.safetensors_files import read_headers

GATE = "model.layers.1.mlp.gate_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file."""
    folder = tmp_path_factory.mktemp("whole")
    write_folder(folder, Case("llama"), max_shard_size="1GB")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_folder(folder, Case("llama", keys={"tie_word_embeddings": True}), max_shard_size="20KB")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def set_keys(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(GATE), f"missing are {GATE} (1 in all)"),
    "renamed": (
        lambda tensors: tensors.update({GATE.replace("gate", "gat"): tensors.pop(GATE)}),
        f"missing are {GATE} (1 in all); left over are {GATE.replace('gate', 'gat')} (1 in all)",
    ),
    "extra": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}),
        "left over are model.layers.0.self_attn.q_proj.bias (1 in all)",
    ),
    "of a layer too many": (
        lambda tensors: tensors.update({"model.layers.4.input_layernorm.weight": np.ones(24, np.float32)}),
        "left over are model.layers.4.input_layernorm.weight (1 in all)",
    ),
    "transposed": (
        lambda tensors: tensors.update({GATE: tensors[GATE].T}),
        f"of another size: {GATE} is [24, 40], expected [40, 24] (1 in all)",
    ),
    "wrongly shaped": (
        lambda tensors: tensors.update({GATE: tensors[GATE][:39]}),
        f"of another size: {GATE} is [39, 24], expected [40, 24] (1 in all)",
    ),
    "of a strange type": (
        lambda tensors: tensors.update({GATE: tensors[GATE].astype(np.float64)}),
        f"of another type than BF16, F16, F32: {GATE} is F64",
    ),
    "without a head": (
        lambda tensors: tensors.pop(HEAD),
        "missing are lm_head.weight (1 in all). If the head is the embedding, say so in config.json",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_its_name(copy: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    change(copy, edit)
    with pytest.raises(MismatchError, match=re.escape(message)):
        open_folder(copy, "teacher")


def test_buffers_of_older_folders_are_no_weights(copy: Path) -> None:
    before = describe_folder(copy, "teacher").parameters
    change(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}))
    assert describe_folder(copy, "teacher").parameters == before


def test_a_pickle_folder_is_refused_with_what_to_do(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UsageError, match=r"pickles \(pytorch_model.bin\).*save_pretrained"):
        read_record(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="no safetensors; expected model.safetensors or model.safetensors.index.json"):
        read_record(copy)


def test_an_adapter_is_no_model_and_is_not_left_out(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(MismatchError, match="has an adapter_config.json: an adapter .* merge it with peft's"):
        read_record(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match="adapter_config.json: an adapter .LoRA. without its model; merge the two"):
        read_record(copy)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="safetensors without a config.json that names a model_type: copy it"):
        read_record(copy)


def test_pickles_beside_safetensors_are_not_read(copy: Path) -> None:
    fingerprint = read_record(copy).fingerprint
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (copy / "consolidated.safetensors").write_bytes(b"Mistral's own form, beside model.safetensors")
    assert read_record(copy).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content[:-1], "the file was cut, replaced or half copied"),
        (lambda content: content + b"\0", "the file was cut, replaced or half copied"),
        (lambda content: content[:5], "not a safetensors file, or cut short"),
        (lambda content: b"\xff" * 8 + content[8:], "not a safetensors file, or cut short"),
        (lambda content: content[:8] + b"x" + content[9:], "its header cannot be read"),
        (lambda content: content.replace(b'"F32"', b'"F16"', 1), "its header cannot be read: ValueError"),
        (lambda content: content.replace(b'"F32"', b'"X32"', 1), "has the type X32; expected one of"),
    ],
)
def test_damaged_files(copy: Path, edit: Callable[[bytes], bytes], message: str) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises((CorruptError, MismatchError), match=message):
        open_folder(copy, "teacher")


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        (
            b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
            CorruptError,
            "cannot be read: Overflow",
        ),
        (b"[" * 100_000, CorruptError, "cannot be read: RecursionError"),
        (b'{"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}', MismatchError, "x has the type F4; expected"),
    ],
)
def test_headers_that_no_program_writes(copy: Path, header: bytes, error: type[Exception], message: str) -> None:
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(error, match=message):
        open_folder(copy, "teacher")


def test_what_a_download_may_leave_in_a_files_place(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 123\n")
    with pytest.raises(CorruptError, match="a pointer of Git LFS in place of the weights: run 'git lfs pull'"):
        open_folder(copy, "teacher")
    file.unlink()
    file.symlink_to("../blobs/of-a-cache-that-was-emptied")
    with pytest.raises(CorruptError, match=r"links to files that are not there \(model.safetensors\)"):
        open_folder(copy, "teacher")


def test_shards_and_their_index_must_agree(sharded: Path, tmp_path: Path) -> None:
    def copied() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(sharded, tmp_path / "copy"))

    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 3
    folder = copied()
    (folder / files[1]).unlink()
    with pytest.raises(CorruptError, match=rf"lacks {files[1]}, which model.safetensors.index.json names"):
        read_headers(folder, "teacher")
    folder = copied()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBEDDING] = files[-1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=f"{EMBEDDING} is in .*, and model.safetensors.index.json says {files[-1]}"):
        read_headers(folder, "teacher")
    index["weight_map"]["model.more"] = files[0]
    del index["weight_map"][EMBEDDING]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="model.more is not in .*says nothing of it"):
        read_headers(folder, "teacher")
    folder = copied()
    save_file({EMBEDDING: np.zeros((131, 24), np.float32)}, folder / files[-1])
    with pytest.raises(CorruptError, match=f"{EMBEDDING} lies in .* and in {files[-1]}"):
        read_headers(folder, "teacher")
    assert len(read_headers(sharded, "teacher")) == 4 * 9 + 2


def test_tied_heads(copy: Path) -> None:
    """A head that is there and tied must have the embedding's bytes; the class's default counts if absent."""
    set_keys(copy, tie_word_embeddings=True)
    with pytest.raises(MismatchError, match="lm_head.weight has other numbers than .* tie_word_embeddings is true"):
        open_folder(copy, "teacher")
    change(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}))
    described = describe_folder(copy, "teacher").parameters
    assert described["shape"]["tied"] and described["huggingface"]["head_is_stored"]
    change(copy, lambda tensors: tensors.pop(HEAD))
    described = describe_folder(copy, "teacher").parameters
    assert described["shape"]["tied"] and not described["huggingface"]["head_is_stored"]
    config = json.loads((copy / "config.json").read_text())
    del config["tie_word_embeddings"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"tie_word_embeddings true \(missing means false for llama\)"):
        open_folder(copy, "teacher")
    set_keys(copy, model_type="smollm3", architectures=None)
    assert open_folder(copy, "teacher").shape.tied


def test_precision_is_that_of_the_tensors(copy: Path) -> None:
    set_keys(copy, dtype="bfloat16")
    assert not read_record(copy).shape.bf16


def test_a_record_is_like_that_of_a_checkpoint(whole: Path, copy: Path, tmp_path: Path) -> None:
    record = read_record(whole, role="teacher")
    assert (record.form, record.foreign, record.iteration) == ("huggingface", True, 0)
    assert (record.vocab_size, record.rows, record.seq_length, record.tokenizer) == (131, 131, 64, None)
    assert record.huggingface is not None and record.huggingface["config"]["model_type"] == "llama"
    (copy / "README.md").write_text("says nothing about the model")
    assert read_record(copy).fingerprint == record.fingerprint
    change(copy, lambda tensors: tensors.update({GATE: tensors[GATE] * 2}))
    assert read_record(copy).fingerprint != record.fingerprint
    with pytest.raises(UsageError, match="is a Hugging Face folder, without iterations: leave --iteration out"):
        read_record(whole, 3, flag="--iteration")


def test_tokenizer_beside_the_model(copy: Path) -> None:
    """The true vocabulary is the tokenizer's; more rows are padding, and fewer are refused."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    def write_tokenizer(num_words: int) -> None:
        words = {"</s>": 0} | {f"w{i}": i for i in range(1, num_words)}
        Tokenizer(WordLevel(words, unk_token="</s>")).save(str(copy / "tokenizer.json"))
        (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))

    write_tokenizer(120)
    record = read_record(copy)
    assert record.tokenizer is not None and record.tokenizer["type"] == "HuggingFaceTokenizer"
    assert (record.vocab_size, record.rows, record.tokenizer["eod"]) == (120, None, 0)
    assert record.shape.rows(record.vocab_size, 1) == 256  # all 131, and padding
    write_tokenizer(132)
    with pytest.raises(MismatchError, match="the embedding has 131 rows, the tokenizer beside it 132 ids"):
        read_record(copy)


def test_an_adopted_folder_is_held_against_its_hashes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest has the fingerprint that the folder has without one; what changes later is damage."""
    fingerprint = read_record(copy).fingerprint
    assert main(["verify", str(copy)]) == ExitStatus.USAGE
    assert "verify --adopt" in capsys.readouterr().err
    assert main(["verify", "--adopt", str(copy)]) == ExitStatus.COMPLETE
    record = read_record(copy)
    assert record.checked and record.fingerprint == fingerprint
    (copy / "README.md").write_text("no part of the model")
    assert main(["verify", str(copy)]) == ExitStatus.COMPLETE
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    read_record(copy)  # tensors are compared when they are loaded
    assert main(["verify", str(copy)]) == ExitStatus.CORRUPT
    set_keys(copy, rms_norm_eps=0.1)
    with pytest.raises(CorruptError, match=r"config.json: "):
        read_record(copy)
