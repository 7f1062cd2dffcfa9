"""The weights in a checkpoint are the optimizer's, however parameters are gathered and whatever asked for the save."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import losses, make_tree, run_training, weights, write_dataset
from worlds import Worlds

DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
BF16 = {"bf16": True}
TIED = {"untie_embeddings_and_output_weights": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("whole") / "data")


def run_until_asked(tree: dict[str, Any], signal_at: int | None) -> int:
    """A whole run; rank 0 gets SIGTERM in step ``signal_at``."""
    from megakd.train import loop

    run_step = loop.run_step

    def signalled(*arguments: Any, step: int, **keywords: Any) -> Any:
        if step == signal_at and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(*arguments, step=step, **keywords)

    loop.run_step = signalled
    try:
        return run_training(tree)
    finally:
        loop.run_step = run_step


def stale_weights(folder: str, iteration: int) -> tuple[int, int]:
    """How many weights of a checkpoint are not the optimizer's fp32 ones in the weights' dtype, and how many are."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.record import checkpoint_path
    from megakd.parallel import init_parallel

    init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint_path(folder, iteration)))
    differ = same = 0
    for key, value in tensors.items():
        main = tensors.get(f"optimizer.state.param.{key}", tensors.get(f"optimizer.state.fp32_param.{key}"))
        if main is not None:
            wrong = int((main.to(value.dtype) != value).sum())
            differ, same = differ + wrong, same + value.numel() - wrong
    return differ, same


# name -> (ranks, layout, what else the student is, how the run ends, in the background)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str, bool]] = {
    "dp2-fp32-end": (2, OVERLAPPED, {}, "end", False),
    "dp2-bf16-signal": (2, OVERLAPPED, BF16, "signal", False),
    "dp2-fp32-exit-interval-background": (2, OVERLAPPED, TIED, "exit interval", True),
    "tp2-dp2-bf16-end-background": (4, {**TP2, **OVERLAPPED}, BF16, "end", True),
    "interleaved-dp2-bf16-signal": (4, {**INTERLEAVED, **OVERLAPPED}, BF16, "signal", False),
}


def _marks(name: str, ranks: int) -> Any:
    """Four ranks take their time on two cores; interleaved stages most of all."""
    return pytest.mark.long if name.startswith("interleaved") else pytest.mark.slow if ranks > 2 else ()


EVERY = {
    f"{layout}-{gather}-{dtype}-{ending}{'-background' * background}": (
        2 if layout == "dp2" else 4, {**shape, **overlap}, student, ending, background
    )
    for layout, shape in (("dp2", {}), ("tp2-dp2", TP2), ("interleaved-dp2", INTERLEAVED))
    for gather, overlap in (
        ("plain", DISTRIBUTED), ("grads", {**DISTRIBUTED, "overlap_grad_reduce": True}), ("params", OVERLAPPED)
    )
    for dtype, student in (("fp32", {}), ("bf16", BF16), ("bf16-tied", {**BF16, **TIED}))
    for ending in ("end", "signal", "exit interval")
    for background in (False, True)
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name, marks=_marks(name, case[0])) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.long) for name, case in EVERY.items()),
    ],
)
def test_the_weights_in_the_file_are_the_optimizers(
    case: tuple[int, dict[str, Any], dict[str, Any], str, bool], data: str, world: Worlds, tmp_path: Path
) -> None:
    size, parallel, student, ending, background = case
    save = tmp_path / "run"
    tree = make_tree(
        data,
        training={"train_iters": 3 if ending == "end" else 5},
        parallel=parallel,
        student={**student, "hidden_size": 16, "ffn_hidden_size": 24},
        checkpoint={"save": str(save), "save_interval": 2, "async_save": background},
    )
    if ending == "exit interval":
        tree["training"]["exit_interval"] = 3
    expected = 0 if ending == "end" else 75
    assert set(world(size).run(run_until_asked, tree, 3 if ending == "signal" else None)) == {expected}
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    for iteration in (2, 3):
        ((differ, same),) = world(1).run(stale_weights, str(save), iteration)
        assert differ == 0 and same > 10_000, f"iteration {iteration}: {differ} of {differ + same}"


def run_of_an_older_version(tree: dict[str, Any]) -> int:
    """A whole run whose checkpoints hold what each rank has of the weights."""
    from megakd.train.optim import Student

    whole = Student.whole
    Student.whole = lambda self: self.chunks  # type: ignore[method-assign]
    try:
        return run_training(tree)
    finally:
        Student.whole = whole  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [pytest.param(run_training, marks=pytest.mark.long), run_of_an_older_version], ids=["this", "older"]
)
def test_a_bf16_run_that_resumes_differs_in_no_bit(first: Any, data: str, world: Worlds, tmp_path: Path) -> None:
    """Also from a checkpoint of stale weights: what counts in it is the optimizer's."""

    def tree(name: str, **training: int) -> dict[str, Any]:
        checkpoint = {"save": str(tmp_path / name), "save_interval": 2}
        student = {**BF16, "hidden_size": 16, "ffn_hidden_size": 24}
        return make_tree(
            data, training={"train_iters": 4, **training}, parallel=OVERLAPPED, student=student, checkpoint=checkpoint
        )

    assert set(world(2).run(run_training, tree("whole"))) == {0}
    assert set(world(2).run(first, tree("cut", exit_interval=2))) == {75}
    if first is run_of_an_older_version:
        assert world(1).run(stale_weights, str(tmp_path / "cut"), 2)[0][0] > 1000
    assert set(world(2).run(run_training, tree("cut"))) == {0}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert world(1).run(weights, str(tmp_path / "cut"), 4) == world(1).run(weights, str(tmp_path / "whole"), 4)


@pytest.mark.slow
def test_an_evaluation_on_fewer_ranks_is_of_the_same_weights(data: str, world: Worlds, tmp_path: Path) -> None:
    tree = make_tree(
        data,
        training={"train_iters": 2},
        parallel=OVERLAPPED,
        data={"valid_data_path": [data]},
        evaluate={"eval_interval": 2, "eval_iters": 2},
        checkpoint={"save": str(tmp_path / "run")},
    )
    assert world(2).run(run_training, tree) == [0, 0]
    alone = {**tree, "parallel": DISTRIBUTED, "evaluate": {"skip_train": True, "eval_iters": 2}}
    assert world(1).run(run_training, alone) == [0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    there, here = (line["valid"]["lm_loss"] for line in lines if "valid" in line)
    assert here == pytest.approx(there, rel=1e-6)
