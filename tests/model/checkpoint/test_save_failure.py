"""A checkpoint that cannot be written: status 6 with its path, nothing half, and what was saved before as it was."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from runs import make_config, make_tree, run_training, write_dataset
from worlds import RankError, Worlds

from megakd.artefacts.manifest import verify_files
from megakd.errors import ExitStatus, UsageError
from megakd.model.checkpoint.record import latest_iteration
from megakd.train.preflight import check_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("failure") / "data")


def run_limited(tree: dict[str, Any], limit_bytes: int, ranks: tuple[int, ...]) -> tuple[int | None, str]:
    """A run whose files cannot grow beyond a limit on some ranks, from its first checkpoint on (the tests' processes
    meet in a file that grows before): the status and message that it ends with."""
    import torch.distributed as dist

    from megakd.model.checkpoint import save as checkpoint

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = checkpoint.dist_checkpointing.save

    def limited(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() in ranks:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        return original(*args, **kwargs)

    checkpoint.dist_checkpointing.save = limited
    try:
        return run_training(tree), ""
    except OSError as error:
        return getattr(error, "status", None), str(error)
    finally:
        checkpoint.dist_checkpointing.save = original
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "background", "limit_bytes"), [((0, 1), False, 90_000), ((1,), False, 4000), ((0,), True, 90_000)]
)
def test_a_file_size_limit_is_told_by_every_rank(
    data: str, world: Worlds, tmp_path: Path, ranks: tuple[int, ...], background: bool, limit_bytes: int
) -> None:
    def tree(steps: int) -> dict[str, Any]:
        checkpoint = {"save": str(tmp_path / "run"), "save_interval": 2, "async_save": background}
        parallel = {"tensor_model_parallel_size": 2}
        return make_tree(data, training={"train_iters": steps}, checkpoint=checkpoint, parallel=parallel)

    assert world(2).run(run_training, tree(2)) == [0, 0]
    for status, message in world(2).run(run_limited, tree(4), limit_bytes, ranks):
        assert status == ExitStatus.NO_SPACE
        assert "File too large" in message and "iter_0000004.partial" in message
    left = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert left == ["iter_0000002"] and not verify_files(tmp_path / "run" / "iter_0000002" / "manifest.json")
    assert latest_iteration(tmp_path / "run") == 2


def test_what_is_no_folder_is_refused_before_the_first_step(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for save in ("/dev/null", str(tmp_path / "file"), str(tmp_path / "file" / "run")):
        with pytest.raises(UsageError, match=f"--save {save}: .* is a file; expected a folder"):
            check_run(make_config(make_tree(data, checkpoint={"save": save})), 1)


def test_a_failure_of_another_kind_is_no_lack_of_space(data: str, world: Worlds, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="AttributeError"):
        world(1).run(explain_something_else, str(tmp_path))


def explain_something_else(folder: str) -> None:
    from megakd.model.checkpoint.save_failure import explained

    (Path(folder) / "common.pt").touch()
    with pytest.raises(RuntimeError, match="of another kind"), explained(Path(folder)):
        raise RuntimeError("of another kind")
    with explained(Path(folder)):
        raise AttributeError
