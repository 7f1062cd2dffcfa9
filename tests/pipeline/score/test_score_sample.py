"""Scores of a part of the samples: the same part for every model and any ranks, with the values of whole scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.score.score_runs import make_config, run_score, run_some
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.scores.artefact import Scores
from megakd.errors import MismatchError, UsageError
from megakd.pipeline.report.main import main as report
from megakd.pipeline.score.preflight import check_score, draw_sample
from megakd.pipeline.select.main import main as select

SEQ = 16
FRACTION, SEED = 0.2, 7


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models, whole scores and those of a part by one rank."""
    folder = tmp_path_factory.mktemp("score-sample")
    made: dict[str, Any] = {"folder": folder, "data": write_dataset(folder / "data", num_tokens=1900)}
    for name, seed in (("model", 5), ("second", 6)):
        tree = make_tree(
            made["data"], training={"train_iters": 1, "seed": seed}, checkpoint={"save": str(folder / name)}
        )
        assert world(1).run(run_training, tree) == [0]
        made[name] = str(folder / name)
    assert world(1).run(run_score, tree_of(made, folder / "whole", sample_fraction=1.0)) == [0]
    assert world(1).run(run_score, tree_of(made, folder / "part")) == [0]
    assert world(1).run(run_score, tree_of(made, folder / "part2", load=made["second"])) == [0]
    return made


def tree_of(made: dict[str, Any], output: Path, **more: Any) -> dict[str, Any]:
    tree = {"load": made["model"], "data_path": made["data"], "seq_length": SEQ, "output": str(output)}
    tree |= {"range_samples": 3, "log_interval": 0.0, "sample_fraction": FRACTION, "sample_seed": SEED}
    return tree | {"per_token_log_probs": True} | more


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_draw_is_exact_nested_and_its_own() -> None:
    small, large = (draw_sample(1000, fraction=f, seed=3) for f in (0.05, 0.3))
    assert len(small) == 50 and len(large) == 300 and np.isin(small, large).all()
    assert (np.diff(large) > 0).all() and large[0] >= 0 and large[-1] < 1000
    assert not np.array_equal(small, draw_sample(1000, fraction=0.05, seed=4))
    assert len(draw_sample(10, fraction=0.001, seed=0)) == 1
    # evenly over the samples: 300 of 1000 in ten tenths, each within five standard deviations
    assert np.abs(np.histogram(large, bins=10, range=(0, 1000))[0] - 30).max() < 5 * np.sqrt(30 * 0.7)


@pytest.mark.slow
def test_a_part_has_the_values_of_the_whole(made: dict[str, Any]) -> None:
    whole, part = Scores(made["folder"] / "whole"), Scores(made["folder"] / "part")
    ids = draw_sample(whole.num_samples, fraction=FRACTION, seed=SEED)
    scored = np.isin(np.arange(whole.num_samples), ids)
    assert len(ids) == 24 and part.num_samples == whole.num_samples == 118
    assert part.sampled == {"fraction": FRACTION, "seed": SEED, "num_scored": 24} and whole.sampled is None
    assert "sampled" not in whole.manifest.parameters
    np.testing.assert_allclose(part.log_probs[scored], whole.log_probs[scored], rtol=1e-6)
    assert np.isnan(part.log_probs[~scored]).all() and (part.counts[~scored] == 0).all()
    assert (part.counts[scored] == SEQ).all()
    assert part.token_log_probs is not None and np.isnan(part.token_log_probs[~scored]).all()
    assert np.isfinite(part.token_log_probs[scored]).all()
    assert (Scores(made["folder"] / "part2").counts == part.counts).all()


@pytest.mark.slow
def test_two_ranks_and_a_resume_write_the_same_bytes(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    assert set(world(2).run(run_score, tree_of(made, tmp_path / "two"))) == {0}
    ids = draw_sample(118, fraction=FRACTION, seed=SEED)
    (done,) = world(1).run(run_some, tree_of(made, tmp_path / "resumed"), 9)
    assert done == (ids < 27).sum()
    assert world(1).run(run_score, tree_of(made, tmp_path / "resumed")) == [0]
    assert files(tmp_path / "two") == files(tmp_path / "resumed") == files(made["folder"] / "part")


@pytest.mark.parametrize("more", [{"sample_fraction": 0.3}, {"sample_seed": 8}, {"sample_fraction": 1.0}])
def test_another_part_is_another_score(more: dict[str, Any], made: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="sampled: .*0.2.* there"):
        check_score(make_config(tree_of(made, made["folder"] / "part", **more)), 1)
    with pytest.raises(MismatchError, match="sampled: None there"):
        check_score(make_config(tree_of(made, made["folder"] / "whole")), 1)


def test_select_refuses_a_part_and_report_shows_it(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made["folder"]
    pair = ["--teacher-scores", str(folder / "part"), "--reference-scores", str(folder / "part2")]
    with pytest.raises(UsageError, match="24 of 118 samples.*megakd proxy"):
        select([*pair, "--output", str(tmp_path / "s")])
    mixed = ["--teacher-scores", str(folder / "part"), "--reference-scores", str(folder / "whole")]
    with pytest.raises(MismatchError, match="sampled"):
        select([*mixed, "--output", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()
    assert report([*pair, "--output", str(tmp_path / "r")]) == 0
    assert "24 with a score, of 118" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_is_a_share(fraction: float, made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sample-fraction"):
        make_config(tree_of(made, tmp_path, sample_fraction=fraction))
