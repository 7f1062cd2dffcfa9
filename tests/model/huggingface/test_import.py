"""Models of every family from Hugging Face folders: logits equal those of transformers, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.folders import (
    CASES,
    SEQ_LENGTH,
    VOCAB,
    Case,
    logits_of_transformers,
    random_tokens,
    write_folder,
)
from model.huggingface.frozen_logits import frozen_logits, joined
from numpy.typing import NDArray
from worlds import Worlds

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
EXPERTS_TP_2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, NDArray[np.float32]]]:
    """Folder and logits of each case."""
    made, tokens = {}, random_tokens()
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, logits_of_transformers(write_folder(folder, case), tokens)
    return made


def has_experts(case: Case) -> bool:
    return case.model_type in ("mixtral", "qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(
    world: Worlds, folders: dict[str, tuple[Path, NDArray[np.float32]]], layout: str
) -> None:
    sizes = LAYOUTS[layout]
    plain = [name for name in CASES if not (layout == "TP 2" and has_experts(CASES[name]))]
    expert = [name for name in CASES if name not in plain]
    for names, layout_sizes in ((plain, sizes), (expert, EXPERTS_TP_2)):
        if not names:
            continue
        tokens = random_tokens()[:, : 28 if layout_sizes.get("sequence_parallel") else None]
        size = max(
            layout_sizes.get("tensor_model_parallel_size", 1), layout_sizes.get("pipeline_model_parallel_size", 1)
        )
        paths = [str(folders[name][0]) for name in names]
        ours = joined(world(size).run(frozen_logits, paths, layout_sizes, tokens))
        for name, logits in zip(names, ours):
            theirs = folders[name][1][:, : tokens.shape[1]]
            assert logits.shape == theirs.shape
            difference = np.abs(logits - theirs).max() / np.abs(theirs).max()
            assert difference < 1e-5, f"{name}: {difference}"


@pytest.mark.slow
def test_experts_split_over_ranks(world: Worlds, folders: dict[str, tuple[Path, NDArray[np.float32]]]) -> None:
    """With expert parallelism each rank loads its own experts alone; the result is the whole model's."""
    names = [name for name in CASES if has_experts(CASES[name])]
    paths = [str(folders[name][0]) for name in names]
    for logits_of_rank in world(2).run(frozen_logits, paths, {"expert_model_parallel_size": 2}, random_tokens()):
        for name, logits in zip(names, logits_of_rank):
            theirs = folders[name][1]
            assert np.abs(logits - theirs).max() / np.abs(theirs).max() < 1e-5


def weights_of_chunks(path: str, sizes: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """This rank's embedding and output weight, and the first norm of each of its layers, by global number."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.checkpoint.record import read_record
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    groups, record = init_parallel(ParallelConfig(**sizes), seed=1), read_record(path)
    chunks = build_model(record.shape, groups, vocab_size=record.vocab_size, seq_length=SEQ_LENGTH)
    load_weights(record, chunks, groups)
    found = {}
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                found["embedding" if chunk.pre_process else "head"] = weight.detach().numpy()
        for layer in chunk.decoder.layers:
            found[f"layer {layer.layer_number - 1}"] = layer.input_layernorm.weight.detach().numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"virtual_pipeline_model_parallel_size": 2}])
def test_tied_heads_over_pipeline_stages(world: Worlds, tmp_path: Path, sizes: dict[str, Any]) -> None:
    """First and last stage have the same rows, padding is 0, and interleaved layers are those of their numbers."""
    theirs = write_folder(tmp_path, CASES["qwen2"]).state_dict()
    first, last = world(2).run(weights_of_chunks, str(tmp_path), {"pipeline_model_parallel_size": 2, **sizes})
    np.testing.assert_array_equal(first["embedding"], last["head"])
    np.testing.assert_array_equal(first["embedding"][:VOCAB], theirs["model.embed_tokens.weight"])
    assert not first["embedding"][VOCAB:].any()
    layers = {**first, **last}
    for number in range(4):
        expected = theirs[f"model.layers.{number}.input_layernorm.weight"]
        np.testing.assert_array_equal(layers[f"layer {number}"], expected)
    assert ("layer 1" in first) != bool(sizes)
