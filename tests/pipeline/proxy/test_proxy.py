"""The proxy: what a planted problem teaches it, the same for any number of ranks, and nothing foreign mixed in."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import ForkedVerb
from runs import TOKENIZER, VOCAB, make_tree, run_training
from worlds import Worlds

from megakd.config.tree import from_dict, validate
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.writer import IndexedWriter
from megakd.data.samples.concat import ConcatSamples
from megakd.data.scores.artefact import COUNTS, LOG_PROBS, UNSCORED, Scores, write_scores
from megakd.data.selection import Selection
from megakd.errors import CorruptError, ExitStatus, MismatchError, UsageError
from megakd.model.checkpoint.record import latest_iteration
from megakd.model.proxy.artefact import read_proxy
from megakd.pipeline.proxy.preflight import ProxyConfig, check_proxy
from megakd.pipeline.score.preflight import ScoreConfig, check_score, draw_sample
from megakd.pipeline.select.main import main as select

SEQ = 16
SAMPLES = 600
FRACTION = 0.5
SAMPLED = {"fraction": FRACTION, "seed": 1234, "num_scored": 300}


def call(verb: str, argv: list[str]) -> int:
    """A verb in a world; its exit status as the command's."""
    from megakd.__main__ import VERBS, run
    from megakd.pipeline.proxy import main as proxy
    from megakd.pipeline.score import main as score

    assert verb in VERBS
    return run({"proxy": proxy.main, "score": score.main}[verb], argv)


def run_and_stop(argv: list[str], updates: int) -> int:
    """A fit that is asked to stop after some updates."""
    from megakd.pipeline.proxy import fit as proxy_fit

    config = make_config(argv)
    plan = check_proxy(config)
    asked = proxy_fit.StopFlag.is_set
    calls = iter(range(updates))
    proxy_fit.StopFlag.is_set = lambda self: next(calls, None) is None  # type: ignore[method-assign]
    try:
        return int(proxy_fit.fit(config, plan))
    finally:
        proxy_fit.StopFlag.is_set = asked  # type: ignore[method-assign]


def make_config(argv: list[str]) -> ProxyConfig:
    tree = dict(zip((flag.removeprefix("--").replace("-", "_") for flag in argv[::2]), argv[1::2]))
    config = from_dict(ProxyConfig, tree)
    validate(config)
    return config


def plant(prefix: Path, *, seed: int = 1) -> str:
    """Tokens in which each sample has a share of its own of the ids below 50."""
    rng = np.random.default_rng(seed)
    shares = rng.random(SAMPLES)
    low = rng.random((SAMPLES, SEQ)) < shares[:, None]
    tokens = np.where(low, rng.integers(0, 50, low.shape), rng.integers(50, VOCAB - 1, low.shape)).reshape(-1)
    writer = IndexedWriter(prefix, np.uint16)
    writer.add_documents(np.append(tokens, 0), np.array([tokens.size + 1], np.int32))
    writer.finish(parameters={}, parents={}, tokenizer=TOKENIZER)
    return str(prefix)


def truth(data: str) -> np.ndarray:
    """``[SAMPLES]``: the planted difference, the share of low ids among the inputs."""
    tokens = ConcatSamples(IndexedDataset(data), SEQ).read(np.arange(SAMPLES))[:, :SEQ]
    return (tokens < 50).mean(axis=1)


def write_pair(folder: Path, data: str, difference: np.ndarray, *, ids: np.ndarray | None, **more: Any) -> list[str]:
    """Scores of two models whose difference per token is the one given; the flags that name them."""
    rng = np.random.default_rng(2)
    reference = -SEQ * (3 + rng.random(SAMPLES))
    counts = np.full(SAMPLES, SEQ)
    scored = np.zeros(SAMPLES, bool)
    scored[slice(None) if ids is None else ids] = True
    counts[~scored] = UNSCORED[COUNTS]
    parameters: dict[str, Any] = {"packing": "concat", "seq_length": SEQ, "mask_policy": "all", "precision": "fp32"}
    parameters |= {} if ids is None else {"sampled": SAMPLED}
    flags = []
    for name, values in (("teacher", reference + SEQ * difference), ("reference", reference)):
        write_scores(
            folder / name,
            np.where(scored, values, UNSCORED[LOG_PROBS]).astype(np.float32),
            counts.astype(np.int32),
            parameters=parameters | more.get(name, {}),
            parents={"dataset": IndexedDataset(data).fingerprint, "model": name},
            tokenizer=TOKENIZER,
        )
        flags += [f"--{name}-scores", str(folder / name)]
    return flags


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A corpus with a planted difference, scores of a sample, a model, and the proxy fitted by one rank."""
    folder = tmp_path_factory.mktemp("proxy")
    made: dict[str, Any] = {"folder": folder, "data": plant(folder / "data")}
    made["other"] = plant(folder / "other data", seed=2)
    tree = make_tree(made["data"], training={"train_iters": 1}, checkpoint={"save": str(folder / "model")})
    tree["student"] |= {"num_layers": 2, "untie_embeddings_and_output_weights": True}
    assert world(1).run(run_training, tree) == [0]
    made["ids"] = draw_sample(SAMPLES, fraction=FRACTION, seed=1234)
    made["pair"] = write_pair(folder / "scores", made["data"], truth(made["data"]), ids=made["ids"])
    made["flags"] = ["--load", str(folder / "model"), "--data-path", made["data"], *made["pair"]]
    made["flags"] += ["--lr", "0.01", "--epochs", "4", "--log-interval", "0"]
    assert world(1).run(call, "proxy", flags_of(made, folder / "whole")) == [0]
    return made


def flags_of(made: dict[str, Any], output: Path, *more: str) -> list[str]:
    return [*made["flags"], "--output", str(output), *more]


def score_flags(made: dict[str, Any], proxy: Path, output: Path, *more: str) -> list[str]:
    flags = ["--proxy", str(proxy), "--data-path", made["data"], "--seq-length", str(SEQ), "--output", str(output)]
    return [*flags, "--range-samples", "70", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_planted_difference_is_learnt(made: dict[str, Any]) -> None:
    proxy = read_proxy(made["folder"] / "whole")
    parameters = proxy.manifest.parameters
    figures = parameters["figures"]
    assert (parameters["num_trained"], parameters["num_held_out"]) == (270, 30)
    assert figures["proxy"]["spearman"] > 0.9 and figures["proxy"]["pearson"] > 0.9
    assert figures["proxy"]["keep_agreement"] > 0.8 and figures["proxy"]["r_squared"] > 0.8
    assert figures["constant"] == {"pearson": None, "spearman": None, "r_squared": 0.0, "keep_agreement": 0.5}
    assert abs(figures["reference NLL alone"]["spearman"]) < 0.6  # it was drawn apart from the difference
    lines = (proxy.folder / "held_out.csv").read_text().splitlines()
    assert lines[0] == "sample_id,difference,predicted,reference_nll" and len(lines) == 31
    held_out = np.array([int(line.split(",")[0]) for line in lines[1:]])
    assert np.isin(held_out, made["ids"]).all()
    rows = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    np.testing.assert_allclose(rows[:, 1], truth(made["data"])[held_out], atol=1e-5)
    assert figures["proxy"]["pearson"] == pytest.approx(np.corrcoef(rows[:, 1], rows[:, 2])[0, 1])
    assert (proxy.folder / "predicted.png").read_bytes().startswith(b"\x89PNG")
    best = min(parameters["history"], key=lambda epoch: epoch["held_out_error"])
    assert [path.name for path in proxy.folder.glob("iter_*")] == [f"iter_{best['iteration']:07d}"]
    assert not (proxy.folder / "proxy.lock").exists()


@pytest.mark.slow
def test_its_scores_select_what_it_predicts(
    made: dict[str, Any], world: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = read_proxy(made["folder"] / "whole")
    assert world(1).run(call, "score", score_flags(made, proxy.folder, tmp_path / "s")) == [0]
    scores = Scores(tmp_path / "s", expect_dataset=IndexedDataset(made["data"]).fingerprint)
    assert scores.manifest.parents["model"] == proxy.manifest.fingerprint and scores.sampled is None
    assert (scores.counts == SEQ).all()
    predicted = scores.log_probs / scores.counts
    # what the fit found for its held-out samples, by another path
    rows = np.loadtxt(proxy.folder / "held_out.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(predicted[rows[:, 0].astype(int)], rows[:, 2], atol=1e-5)
    true = truth(made["data"])
    unseen = np.setdiff1d(np.arange(SAMPLES), made["ids"])
    assert np.corrcoef(predicted[unseen], true[unseen])[0, 1] > 0.9
    for name, flags in (
        ("a", ["--scores", f"proxy={tmp_path / 's'}", "--weights", "proxy=-1"]),
        ("b", ["--proxy-scores", str(tmp_path / "s")]),
    ):
        assert select([*flags, "--ratio", "0.25", "--output", str(tmp_path / name)]) == 0
        kept = Selection(tmp_path / name).ids
        assert set(kept.tolist()) == set(np.argsort(-predicted, kind="stable")[:150].tolist())
        assert true[kept].mean() > 0.8
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]])
def test_predictions_do_not_depend_on_ranks(
    layout: list[str], made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    folder = made["folder"] / "whole"
    assert world(1).run(call, "score", score_flags(made, folder, tmp_path / "one")) == [0]
    assert set(world(2).run(call, "score", score_flags(made, folder, tmp_path / "two", *layout))) == {0}
    if not layout:
        assert files(tmp_path / "one") == files(tmp_path / "two")
    np.testing.assert_allclose(Scores(tmp_path / "one").log_probs, Scores(tmp_path / "two").log_probs, atol=1e-5 * SEQ)


def held_out_of(folder: Path) -> np.ndarray:
    return np.loadtxt(folder / "held_out.csv", delimiter=",", skiprows=1)[:, 2]


@pytest.mark.slow
def test_two_ranks_fit_what_one_fits(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    more = ["--epochs", "1", "--lr", "0.001"]
    for size in (1, 2):
        assert set(world(size).run(call, "proxy", flags_of(made, tmp_path / str(size), *more))) == {0}
    np.testing.assert_allclose(held_out_of(tmp_path / "1"), held_out_of(tmp_path / "2"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [4, 9, 12])
def test_what_was_stopped_continues_to_the_same_bits(
    updates: int, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    """In the middle of an epoch, at its end, and after one more."""
    flags = flags_of(made, tmp_path / "p")
    assert world(1).run(run_and_stop, flags, updates - 1) == [int(ExitStatus.STOPPED)]
    assert not (tmp_path / "p" / "proxy.json").exists()
    assert world(1).run(call, "proxy", flags) == [0]
    before, after = (read_proxy(folder).manifest.parameters for folder in (made["folder"] / "whole", tmp_path / "p"))
    assert before == after
    assert world(1).run(call, "proxy", flags) == [0]  # finished already


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGTERM])
def test_a_process_that_is_ended_continues(
    number: signal.Signals, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    """The command itself: what it leaves when it is killed, or asked to stop, is gone on with to the same figures."""
    flags = flags_of(made, tmp_path / "p", "--save-interval", "1")
    process = ForkedVerb(["proxy", *flags])
    deadline = time.monotonic() + 200
    while latest_iteration(tmp_path / "p") is None and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == (ExitStatus.STOPPED if number == signal.SIGTERM else -number), errors
    assert not (tmp_path / "p" / "proxy.json").exists()
    assert world(1).run(call, "proxy", flags) == [0]
    ended, undisturbed = (read_proxy(folder).manifest for folder in (tmp_path / "p", made["folder"] / "whole"))
    assert ended.parameters == undisturbed.parameters
    assert list((tmp_path / "p").glob("*.partial")) == []


@pytest.mark.slow
def test_a_checkpoint_half_written_is_no_mess(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    flags = flags_of(made, tmp_path / "p")
    assert world(1).run(run_and_stop, flags, 9) == [int(ExitStatus.STOPPED)]
    (whole,) = (tmp_path / "p").glob("iter_*0010")
    shutil.copytree(whole, tmp_path / "p" / "iter_0000015.partial")
    assert world(1).run(call, "proxy", flags) == [0]
    assert len(list((tmp_path / "p").glob("iter_*"))) == 1


def test_what_does_not_belong_together_is_refused(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    flags = made["flags"]
    other = write_pair(tmp_path / "other", made["other"], truth(made["other"]), ids=made["ids"])
    whole = write_pair(tmp_path / "whole", made["data"], truth(made["data"]), ids=None)
    cases = [
        (["--data-path", made["data"] + "x"], UsageError, "datax"),
        (["--seq-length", "8"], MismatchError, "scored with seq_length 16, --seq-length is 8"),
        (["--packing", "document"], MismatchError, "scored with packing concat"),
        (other, MismatchError, "fingerprint"),
        (whole[:2], MismatchError, "sampled None"),
        (["--output", str(made["folder"] / "whole"), "--lr", "0.02"], MismatchError, "lr: 0.01 there, 0.02 here"),
        (["--held-out-fraction", "0.001"], UsageError, "leaves 0 to judge by"),
        (["--output", str(made["folder"] / "model")], MismatchError, "another kind of run"),
    ]
    for more, error, message in cases:
        with pytest.raises(error, match=message):
            check_proxy(make_config([*flags, "--output", str(tmp_path / "p"), *more]))
    assert world(1).run(call, "proxy", [*flags, "--output", str(tmp_path / "p"), *other]) == [4]
    predicted = write_pair(
        tmp_path / "predicted", made["data"], truth(made["data"]), ids=None, teacher={"predicts": {}}
    )
    with pytest.raises(UsageError, match="a proxy's predictions"):
        check_proxy(make_config([*flags, "--output", str(tmp_path / "p"), *predicted]))
    with pytest.raises(UsageError, match="predictions of the difference already.*--proxy-scores"):
        select([*predicted, "--output", str(tmp_path / "kept")])
    with pytest.raises(UsageError, match="not a proxy's predictions"):
        select(["--proxy-scores", predicted[-1], "--output", str(tmp_path / "kept")])
    difference = truth(made["data"])
    difference[made["ids"][3]] = np.inf
    infinite = write_pair(tmp_path / "infinite", made["data"], difference, ids=made["ids"])
    with pytest.raises(CorruptError, match=f"1 samples.*{made['ids'][3]}"):
        check_proxy(make_config([*flags, "--output", str(tmp_path / "p"), *infinite]))
    same = write_pair(tmp_path / "same", made["data"], np.zeros(SAMPLES), ids=made["ids"])
    with pytest.raises(UsageError, match="nothing to learn"):
        check_proxy(make_config([*flags, "--output", str(tmp_path / "p"), *same]))
    assert not (tmp_path / "p").exists()


def test_a_proxy_scores_samples_of_its_own_kind(made: dict[str, Any], tmp_path: Path) -> None:
    def check(**more: Any) -> None:
        tree = {"proxy": str(made["folder"] / "whole"), "data_path": made["data"], "output": str(tmp_path / "s")}
        config = from_dict(ScoreConfig, tree | {"seq_length": SEQ} | more)
        validate(config)
        check_score(config, 1)

    check()
    with pytest.raises(MismatchError, match="seq_length 16, asked for seq_length 8"):
        check(seq_length=8)
    with pytest.raises(MismatchError, match="mask_policy all, asked for mask_policy skip_after_eod"):
        check(mask_policy="skip_after_eod")
    with pytest.raises(UsageError, match="one of them"):
        check(load=str(made["folder"] / "model"))
    with pytest.raises(UsageError, match="one number a sample"):
        check(per_token_entropy=True)
    copied = tmp_path / "copied"
    shutil.copytree(made["folder"] / "whole", copied)
    (manifest,) = copied.glob("iter_*/manifest.json")
    body = json.loads(manifest.read_text())
    with pytest.raises(UsageError, match="no manifest here"):
        check(proxy=str(made["folder"] / "model"))
    assert body["format"] == "megakd-checkpoint"
    head = (copied / "head.f32").read_bytes()
    (copied / "head.f32").write_bytes(bytes([head[0] ^ 1]) + head[1:])
    with pytest.raises(CorruptError, match="is damaged: head.f32: block 0.*fit it anew"):
        check(proxy=str(copied))
    with open(copied / "head.f32", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CorruptError, match="head.f32"):
        check(proxy=str(copied))
