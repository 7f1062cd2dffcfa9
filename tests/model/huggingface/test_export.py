"""Exported folders: the bytes that were imported, of any family and layout, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model.huggingface.exports import tensors_of, write_checkpoint
from model.huggingface.folders import CASES, logits_of_transformers, random_tokens, write_folder
from transformers import AutoModelForCausalLM
from worlds import Worlds

from megakd.errors import CorruptError, MismatchError, NoSpaceError, UsageError
from megakd.model.checkpoint.record import read_record
from megakd.model.huggingface import export as export_module
from megakd.model.huggingface.export import export
from megakd.model.huggingface.export_plan import plan_export

pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest")

SHARD = 60_000
# of transformers' configurations, where the same is said in other words: no_rope_layers decides, a window that is off
# has no size, and a head without a width has that of hidden size / heads
MAY_DIFFER = {"_name_or_path", "dtype", "sliding_window", "no_rope_layer_interval", "head_dim"}
SPLIT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}


def export_of(run: Path | str, folder: Path, *, max_shard_bytes: int = SHARD, **options: Any) -> Path:
    export(plan_export(read_record(run), **options), folder, max_shard_bytes=max_shard_bytes)
    return folder


def check_round_trip(theirs: Path, model: Any, ours: Path) -> None:
    """Hold an exported folder against the one that was imported, and against transformers' model of it."""
    assert tensors_of(ours) == tensors_of(theirs)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        ours, output_loading_info=True, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert {key for key in before if before[key] != after.get(key)} <= MAY_DIFFER
    tokens = random_tokens()
    assert torch.equal(
        torch.from_numpy(logits_of_transformers(model, tokens)),
        torch.from_numpy(logits_of_transformers(loaded.eval(), tokens)),
    )


@pytest.mark.slow
def test_import_and_export_give_back_the_bytes(tmp_path: Path, world: Worlds) -> None:
    for name, case in CASES.items():
        theirs, run, ours = (tmp_path / name / part for part in ("theirs", "run", "ours"))
        model = write_folder(theirs, case)
        world(1).run(write_checkpoint, str(theirs), str(run), {})
        check_round_trip(theirs, model, export_of(run, ours))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> dict[str, Path]:
    """Folder and checkpoint of a Qwen 3, and of a Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("qwen3", "llama-old"):
        write_folder(folder / name, CASES[name])
        world(1).run(write_checkpoint, str(folder / name), str(folder / f"{name}-run"), {})
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3", SPLIT),
        ("llama-old", SPLIT),
        ("mixtral", {**SPLIT, "expert_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_any_layout_gives_the_same_files(tmp_path: Path, world: Worlds, name: str, sizes: dict[str, Any]) -> None:
    theirs = tmp_path / "theirs"
    write_folder(theirs, CASES[name])
    world(1).run(write_checkpoint, str(theirs), str(tmp_path / "whole"), {})
    world(4).run(write_checkpoint, str(theirs), str(tmp_path / "split"), sizes)
    whole, split = (export_of(tmp_path / run, tmp_path / f"{run}-hf") for run in ("whole", "split"))
    assert tensors_of(split) == tensors_of(theirs)
    for file in (path for path in whole.iterdir() if path.name != "export.json"):  # which names the checkpoint
        assert (split / file.name).read_bytes() == file.read_bytes(), file.name


def test_both_generations_find_their_keys(imported: dict[str, Path], tmp_path: Path) -> None:
    for name in ("qwen3", "llama-old"):
        config = json.loads((export_of(imported[f"{name}-run"], tmp_path / name) / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "float32"
        rope = config["rope_parameters"]
        assert config["rope_theta"] == rope["rope_theta"]
        expected = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
        assert config["rope_scaling"] == expected
        assert config["head_dim"] == (8 if name == "qwen3" else 4) and config["vocab_size"] == 131
        assert config["tie_word_embeddings"] is (name == "llama-old")
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 2 and generation["bos_token_id"] == 1


def test_files_are_cut_at_the_size_and_named_in_an_index(imported: dict[str, Path], tmp_path: Path) -> None:
    cut = export_of(imported["qwen3-run"], tmp_path / "cut", max_shard_bytes=20_000)
    one = export_of(imported["qwen3-run"], tmp_path / "one", max_shard_bytes=10**9)
    assert tensors_of(cut) == tensors_of(one)
    assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(one).keys() and len(set(index.values())) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type(imported: dict[str, Path], tmp_path: Path, dtype: Any) -> None:
    plain = tensors_of(export_of(imported["qwen3-run"], tmp_path / "plain"))
    cast = tensors_of(export_of(imported["qwen3-run"], tmp_path / "cast", dtype=dtype))
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == dtype
    for name, (_, shape, content) in plain.items():
        expected = torch.frombuffer(bytearray(content), dtype=torch.float32).to(getattr(torch, dtype))
        assert cast[name][:2] == (f"torch.{dtype}", shape)
        assert cast[name][2] == expected.view(torch.uint8).numpy().tobytes()


def test_a_finished_export_is_kept_and_nothing_else_is_replaced(imported: dict[str, Path], tmp_path: Path) -> None:
    folder = export_of(imported["qwen3-run"], tmp_path / "hf")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    export_of(imported["qwen3-run"], folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(MismatchError, match="checkpoint: .* there, .* here"):
        export_of(imported["llama-old-run"], folder)
    with pytest.raises(MismatchError, match="dtype: None there, bfloat16 here"):
        export_of(imported["qwen3-run"], folder, dtype="bfloat16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is no whole export"):
        export_of(imported["qwen3-run"], tmp_path / "full")
    with pytest.raises(UsageError, match="is a Hugging Face folder already"):
        export_of(folder, tmp_path / "again")


def test_a_killed_export_is_continued(
    imported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], export_module.write_shard

    def killed_at(count: int) -> Any:
        def write_some(folder: Path, shard: Any, read: Any, *, progress: Any) -> Any:
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(shard.file)
            return write(folder, shard, read, progress=progress)

        return write_some

    monkeypatch.setattr(export_module, "write_shard", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        export_of(imported["qwen3-run"], tmp_path / "hf", max_shard_bytes=20_000)
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr(export_module, "write_shard", killed_at(-1))
    export_of(imported["qwen3-run"], tmp_path / "hf", max_shard_bytes=20_000)
    assert len(written) == len(set(written)) == len(list((tmp_path / "hf").glob("*.safetensors")))
    assert tensors_of(tmp_path / "hf") == tensors_of(imported["qwen3"])
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_file_that_a_killed_export_left_damaged_is_found(imported: dict[str, Path], tmp_path: Path) -> None:
    good = export_of(imported["qwen3-run"], tmp_path / "good")
    partial = tmp_path / "hf.partial"
    shutil.copytree(good, partial)
    parameters = export_module.parameters_of(plan_export(read_record(imported["qwen3-run"])), SHARD)
    mark = {"checkpoint": read_record(imported["qwen3-run"]).fingerprint, **parameters}
    (partial / ".of.json").write_bytes(export_module._json(mark))
    file = next(partial.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptError, match="read back is not .* the files were removed, run again"):
        export_of(imported["qwen3-run"], tmp_path / "hf")
    assert not partial.exists() and not (tmp_path / "hf").exists()
    export_of(imported["qwen3-run"], tmp_path / "hf")


@pytest.mark.parametrize("place", ["key", "up", "vocabulary", "whole"])
def test_a_mistake_in_the_order_of_rows_is_found(
    imported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    right = export_module.to_theirs

    def wrong(ours: Any, at: Any, rows: int, shape: Any) -> Any:
        part = right(ours, at, rows, shape)
        return part.roll(1, 0) if at == place else part

    monkeypatch.setattr(export_module, "to_theirs", wrong)
    with pytest.raises(CorruptError, match="read back is not"):
        export_of(imported["qwen3-run"], tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_is_told_before_anything_is_written(
    imported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(NoSpaceError, match="the export needs .* GB are free"):
        export_of(imported["qwen3-run"], tmp_path / "hf")
