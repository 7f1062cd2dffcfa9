"""The recipes of pre-training distillation, read as run.sh starts them; the sweep's own parts: cuts, noise, table."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from logits.rows import as_dicts, random_rows

from megakd.config.tree import parse
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import UsageError
from megakd.logits.codec import Rows, rank_by_frequency
from megakd.logits.spec import StoreSpec
from megakd.logits.store import LogitsStore
from megakd.logits.store_writer import finish_store, write_shard
from megakd.pipeline.capture.preflight import CaptureConfig
from megakd.train.config import TrainConfig
from megakd.train.stored_targets import check_stores

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FOLDER = EXAMPLES / "pretraining_distillation"
RECIPES = sorted(path.parent.name for path in FOLDER.glob("recipes/*/train.yaml"))
OVERLAYS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("recipes/*/online.yaml"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the example as the example itself does."""
    for folder in ("demo", "pretraining_distillation"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    return importlib.import_module


def started(tmp_path: Path, *words: str) -> list[str]:
    """The words behind ``megakd`` of the torchrun that run.sh ends in."""
    stub = tmp_path / "torchrun"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([FOLDER / "run.sh", *words], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[lines.index("megakd") + 1 :]


def read_train(tmp_path: Path, recipe: str, *flags: str) -> TrainConfig:
    verb, *words = started(tmp_path, recipe, "train", *flags)
    assert verb == "train"
    return parse(TrainConfig, words, prog="megakd train", description="")


def read_capture(tmp_path: Path, recipe: str) -> CaptureConfig:
    verb, *words = started(tmp_path, recipe, "capture")
    assert verb == "capture"
    return parse(CaptureConfig, words, prog="megakd capture", description="")


def check(config: TrainConfig) -> None:
    """What does not take data or checkpoints, on one node and on four."""
    config.student.resolve("student").check_layout(config.parallel, "student")
    for world_size in (8, 32):
        config.training.check_batch(config.parallel.data_parallel_size(world_size))
        config.teacher_parallel().data_parallel_size(world_size)


def test_recipes_are_those_of_the_readme() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert len(RECIPES) == 6 and all(f"`{recipe}`" in readme for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    train = read_train(tmp_path, recipe)
    check(train)
    if not (FOLDER / "recipes" / recipe / "capture.yaml").exists():
        assert train.teacher.load and not train.teacher.reads_stores
        train.objective.kd_term().check("dense")
        return
    capture = read_capture(tmp_path, recipe)
    capture.parallel().data_parallel_size(8)
    # What is captured is what is read: the same samples, and a loss that is right for the kind.
    assert train.teacher.logits_load_dir == [capture.output] and train.teacher.load is None
    assert train.data.data_path == [capture.data_path] and train.data.packing == capture.packing
    assert train.data.seq_length == capture.seq_length
    assert train.data.selection == ([] if capture.selection is None else [capture.selection])
    store = SimpleNamespace(folder=capture.output, spec=SimpleNamespace(kind=capture.kind))
    check_stores([store], train.objective)  # type: ignore[list-item]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_online_variant(overlay: str, tmp_path: Path) -> None:
    recipe = Path(overlay).parent.name
    offline, online = read_train(tmp_path, recipe), read_train(tmp_path, recipe, "--config", str(FOLDER / overlay))
    check(online)
    assert online.teacher.load and not online.teacher.reads_stores
    online.objective.kd_term().check("dense")
    assert online.checkpoint.save != offline.checkpoint.save and online.optim == offline.optim


def test_figures_of_the_recipes(tmp_path: Path) -> None:
    first, star = read_train(tmp_path, "pd-first"), read_train(tmp_path, "pd-star")
    tokens = first.training.train_iters * first.training.global_batch_size * first.data.seq_length
    assert tokens == pytest.approx(100e9, rel=1e-3)
    assert (first.objective.kd_alpha, star.objective.kd_alpha) == (1.0, 0.9)
    assert star.objective.kd_temperature == 2.0 and star.optim.lr_decay_style == "WSD"
    schedule = star.kd_schedule()
    assert schedule is not None
    end = star.training.train_iters
    alphas = [schedule.alpha.at(step) for step in (star.optim.lr_warmup_iters // 2 + 1, end // 2, end + 1)]
    assert alphas == pytest.approx([0.45, 0.9, 0.0])
    cuts = [read_capture(tmp_path, name) for name in ("pd-first", "pd-star")]
    assert [(cut.top_p, cut.top_k) for cut in cuts] == [(0.95, 100), (0.95, 50)]
    draws = [read_capture(tmp_path, name).rows()["draws"] for name in ("rs-kd", "miniplm-kd", "gemma-3")]
    assert draws == [50, 50, 256]


def test_a_loss_that_is_wrong_for_its_store_is_noticed(tmp_path: Path) -> None:
    train = read_train(tmp_path, "rs-kd", "--kd-divergence", "reverse_kl")
    store = SimpleNamespace(folder="store", spec=SimpleNamespace(kind="samples"))
    with pytest.raises(UsageError, match="linear"):
        check_stores([store], train.objective)  # type: ignore[list-item]


def test_settings_of_the_sweep(load: Any) -> None:
    """Every flag is one of ``megakd train``, and goes with what the setting reads."""
    settings = load("settings")
    every = [settings.LM, settings.FIRST, *(setting for table in settings.TABLES.values() for setting in table)]
    assert len({setting.name for setting in every}) == len(every)
    for setting in every:
        words = ["--config", str(FOLDER / "student.yaml"), "--data-path", "x", "--train-iters", "100"]
        words += ["--lr-warmup-iters", "5", "--lr-wsd-decay-iters", "20"]
        words += [] if setting.cut is None else ["--logits-load-dir", "x"]
        words += ["--teacher-load", "x", "--kd-tail", "none"] if setting.dense else []
        config = parse(TrainConfig, [*words, *setting.flags.split()], prog="megakd train", description="")
        if setting.cut is not None:
            check_stores([SimpleNamespace(folder="x", spec=SimpleNamespace(kind="top_p_k"))], config.objective)  # type: ignore[list-item]
        assert setting.dense == (config.teacher.load is not None)


def slow_cut(row: dict[int, float], top_p: float, top_k: int) -> dict[int, float]:
    kept, mass = {}, 0.0
    for token, log_prob in sorted(row.items(), key=lambda entry: -entry[1])[:top_k]:
        if mass >= top_p:
            break
        kept[token] = log_prob
        mass += math.exp(log_prob)
    return kept


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 3), (0.5, 7), (0.3, 2), (0.9, 1)])
def test_a_store_is_cut_as_a_walk_over_its_rows_cuts_it(
    load: Any, text: ConcatSamples, tmp_path: Path, top_p: float, top_k: int
) -> None:
    truncate = load("truncate")
    wide = write_store(tmp_path / "wide", text, top_k=7)
    truncate.truncate_store(tmp_path / "wide", tmp_path / "cut", text, top_p=top_p, top_k=top_k)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "shards").iterdir()}
    (tmp_path / "cut" / "store.json").unlink()  # as after a kill: what is there is not written again
    truncate.truncate_store(tmp_path / "wide", tmp_path / "cut", text, top_p=top_p, top_k=top_k)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "shards").iterdir()}

    store = LogitsStore(tmp_path / "cut", dataset=text.dataset.fingerprint, packing="concat", seq_length=13)
    assert (store.spec.top_p, store.spec.top_k) == (top_p, top_k)
    assert store.spec.details["cut_from"] == LogitsStore(tmp_path / "wide").fingerprint
    for sample in range(text.num_samples):
        input_ids = text.read(np.array([sample]))[0, :-1]
        rows = store.read(sample, input_ids)
        assert (rows is not None) == (sample in wide)
        if rows is not None:
            assert as_dicts(rows) == [slow_cut(row, top_p, top_k) for row in as_dicts(wide[sample])]
            np.testing.assert_allclose(rows.entropy_T, wide[sample].entropy_T, atol=1e-3)


def test_a_store_is_not_cut_to_more_than_it_has(load: Any, text: ConcatSamples, tmp_path: Path) -> None:
    write_store(tmp_path / "wide", text, top_k=7)
    for top_p, top_k in ((1.0, 8), (0.9, 20)):
        with pytest.raises(UsageError, match="at least"):
            load("truncate").truncate_store(tmp_path / "wide", tmp_path / "cut", text, top_p=top_p, top_k=top_k)


@pytest.fixture
def text(tmp_path: Path) -> ConcatSamples:
    from runs import write_dataset

    return ConcatSamples(IndexedDataset(write_dataset(tmp_path / "data", seed=3)), 13)


def write_store(folder: Path, samples: ConcatSamples, *, top_k: int) -> dict[int, Rows]:
    """Every second sample's rows, of 32 bits, as they were written."""
    vocab_size = 97
    spec = StoreSpec(
        kind="top_p_k",
        vocab_size=vocab_size,
        packing="concat",
        seq_length=samples.seq_length,
        num_samples=samples.num_samples,
        shard_samples=max(1, samples.num_samples // 3),
        parents={"dataset": samples.dataset.fingerprint, "model": "m"},
        value_bits=32,
        top_k=top_k,
    )
    ranks = rank_by_frequency(np.arange(vocab_size)[::-1])
    written = {}
    for number in range(spec.num_shards):
        writer = write_shard(folder, spec, ranks, number)
        for sample in range(*spec.samples_of(number)):
            if sample % 2 == 0:
                written[sample] = random_rows(sample, samples.seq_length, vocab_size, top_k)
                writer.add(sample, samples.read(np.array([sample]))[0, :-1], written[sample])
        writer.commit()
    finish_store(folder, spec, ranks)
    return written


@pytest.fixture
def findings(load: Any) -> ModuleType:
    module: ModuleType = load("findings")
    return module


def write_runs(folder: Path, losses: dict[str, float]) -> None:
    for name, loss in losses.items():
        (folder / name).mkdir(parents=True)
        lines = [{"step": 1, "tokens": 8, "lm_loss": 9.0}, {"step": 1, "valid": {"lm_loss": 9.0}}]
        lines += [{"step": 2, "valid": {"lm_loss": loss}}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_findings(load: Any, findings: ModuleType, tmp_path: Path) -> None:
    settings = load("settings")
    write_runs(tmp_path, {"lm-seed-5": 4.0, "lm-seed-6": 4.1, "lm-seed-7": 4.2})
    write_runs(tmp_path, {"first-seed-5": 3.5, "first-seed-6": 3.61, "first-seed-7": 3.69})
    write_runs(tmp_path, {"p-0.5-seed-5": 3.515, "p-0.6-seed-5": 3.3})
    made = {"p": settings.TABLES["p"][:2]}
    table = findings.write(tmp_path, made, seed=5, seeds=3)
    # -0.5, -0.49, -0.51: a deviation of 0.01, so that 0.015 is noise and -0.2 is not
    assert "| p | top-p 0.5, k 100 | 3.5150 | **-0.4850** | +0.0150 | +2.1 |" in table
    assert "| p | top-p 0.6, k 100 | 3.3000 | **-0.7000** | **-0.2000** | +1.6 |" in table
    assert "| baseline | LM alone | 4.0000 |  | **+0.5000** | +0.0 |" in table
    assert "LM alone 0.1000" in table and "same seed 0.0100" in table
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["over_seeds"]["first"] == [3.5, 3.61, 3.69] and record["noise"]["paired"] == pytest.approx(0.01)
    assert record["settings"]["p-0.6"] == {"lm_loss": 3.3}
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "**" not in findings.write(tmp_path, made, seed=5, seeds=1)  # one seed tells no noise
