"""The planner: the paper's figures from its sizes, what its flags refuse, what it writes."""

import csv
import dataclasses
import itertools
import json

import pytest

from megakd.__main__ import run
from megakd.artefacts.manifest import hash_file, write_manifest
from megakd.errors import CorruptError, ExitStatus, UsageError
from megakd.model.checkpoint.foreign import BACKENDS
from megakd.model.config import ModelConfig
from megakd.pipeline.planning import main as plan
from megakd.pipeline.planning.costs import (
    ModelSize,
    Refinement,
    advise_ratio,
    amortised,
    epochs,
    gpu_hours,
    minillm_steps,
    model_size,
    shape_parameters,
    storage,
    vanilla_kd_steps,
)
from megakd.pipeline.planning.curves import read_curves

PAPER = ["--student", "200M", "500M", "1.2B", "--teacher", "1.8B", "--reference", "104M"]


def run_plan(*arguments):
    return run(plan.main, [str(argument) for argument in arguments])


def sized(spec, **changes):
    return model_size(spec, **{"flag": "student", "vocab_size": 151936, "seq_length": 1024, **changes})


def refinement(**changes):
    values = {
        "teacher": ModelSize("1.8B", 1.8e9, None),
        "reference": ModelSize("104M", 1.04e8, None),
        "students": (ModelSize("200M", 2e8, None),),
        "corpus_tokens": 105e9,
        "reference_tokens": 5e9,
        "ratio": 0.5,
        "steps": 100_000,
        "batch_tokens": 512 * 1024,
    }
    return Refinement(**{**values, **changes})


@pytest.mark.parametrize(
    "student, kd, minillm, paper_kd, paper_minillm",
    [(2e8, 25000, 13636, 25e3, 15e3), (5e8, 45454, 26785, 45e3, 30e3), (1.2e9, 66666, 42857, 65e3, 40e3)],
)
def test_steps_at_equal_flops(student, kd, minillm, paper_kd, paper_minillm):
    """The paper prints multiples of 5,000, not always the nearest; none is further away than 3,300."""
    sizes = {"student": student, "teacher": 1.8e9}
    assert int(vanilla_kd_steps(100_000, **sizes)) == kd and abs(kd - paper_kd) < 3300
    assert int(minillm_steps(100_000, **sizes)) == minillm and abs(minillm - paper_minillm) < 3300
    # The formula's own meaning: student 6N a token, the teacher's forward pass 2N.
    assert kd * (6 * student + 2 * 1.8e9) == pytest.approx(100_000 * 6 * student, rel=1e-4)


def test_flops_of_the_paper():
    """Scoring 100B tokens: 3.8e20; students on 52B: 6.3e19, 1.6e20, 3.8e20."""
    plan = refinement()
    both = plan.scoring_flops(plan.teacher) + plan.scoring_flops(plan.reference)
    assert both == pytest.approx(2 * 1.904e9 * 1e11) and f"{both:.1e}" == "3.8e+20"
    assert plan.reference_flops == pytest.approx(6 * 1.04e8 * 5e9)
    assert plan.offline_flops == pytest.approx(both + plan.reference_flops)
    for size, flops in ((2e8, "6.3e+19"), (5e8, "1.6e+20"), (1.2e9, "3.8e+20")):
        assert f"{plan.training_flops(ModelSize('', size, None)):.1e}" == flops
    one, two, five = amortised(plan, plan.students[0], [1, 2, 5])
    assert one == pytest.approx(2 * two) == pytest.approx(5 * five) == pytest.approx(plan.offline_flops / 6.291456e19)
    beside = 2 * 1.8e9 * plan.train_tokens
    assert plan.break_even_runs * beside == pytest.approx(plan.offline_flops)


def test_a_proxy_is_counted_for_its_sample_its_training_and_its_scoring():
    proxy = ModelSize("20M", 2e7, None)
    plan = refinement(proxy=proxy, proxy_fraction=0.01, reference_tokens=0, corpus_tokens=1e11)
    expected = 0.01 * 2 * 1.904e9 * 1e11 + 0.01 * 6 * 2e7 * 1e11 + 2 * 2e7 * 1e11
    assert plan.proxy_flops == pytest.approx(expected) and refinement().proxy_flops is None


@pytest.mark.parametrize("preset, millions", [("miniplm-200m", 203), ("miniplm-500m", 464), ("miniplm-104m", 104)])
def test_parameters_of_presets(preset, millions):
    """Tied: every matrix counts, and the sum is what the model cards say."""
    assert round(sized(preset).parameters / 1e6) == pytest.approx(millions, abs=1)


def test_what_counts_as_a_parameter():
    keys = {"num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2}
    attention, feed_forward, vocabulary = 8 * (8 + 2 + 2 + 2 + 2 + 8), 3 * 8 * 20, 8 * 50
    for untied in (False, True):  # the second embedding of an untied model is a lookup
        shape = ModelConfig(**keys, untie_embeddings_and_output_weights=untied).resolve("test")
        assert shape_parameters(shape, 50) == 3 * (attention + feed_forward) + vocabulary
    experts = ModelConfig(**keys, num_experts=8, moe_router_topk=2).resolve("test")
    assert shape_parameters(experts, 50) == 3 * (attention + 2 * feed_forward + 8 * 8) + vocabulary
    assert sized("miniplm-200m", seq_length=2048).attention == pytest.approx(2 * sized("miniplm-200m").attention)


@pytest.mark.parametrize(
    "spec, count", [("200M", 2e8), ("1.8b", 1.8e9), ("1.5e9", 1.5e9), ("135K", 135e3), ("1T", 1e12)]
)
def test_sizes_as_numbers(spec, count):
    assert sized(spec) == ModelSize(spec, count, None)


@pytest.mark.parametrize("spec", ["0", "200", "huge", "200 M", "-1B", "miniplm-7b", "nan", "1e999"])
def test_sizes_refused(spec):
    with pytest.raises(UsageError, match=f"--student {spec}: "):
        sized(spec)


def test_ratio_advice_meets_the_papers_two_points():
    plenty, short = advise_ratio(52e9, 105e9), advise_ratio(50e9, 50e9)
    assert (plenty.regime, plenty.ratio) == ("plentiful", 0.5) and plenty.epochs <= 1
    assert (short.regime, short.ratio, short.epochs) == ("limited", 0.25, 4.0)


def test_ratio_advice_everywhere():
    lengths = [0.01 * 1.05**power for power in range(160)]
    advices = [advise_ratio(length * 1e9, 1e9) for length in lengths]
    for length, advice in zip(lengths, advices):
        assert advice.epochs == pytest.approx(epochs(length, 1, advice.ratio))
        assert 0.25 <= advice.ratio <= 1 and (advice.epochs <= 4 + 1e-9) == (advice.regime != "exhausted")
    assert all(one.epochs < two.epochs + 1e-9 for one, two in itertools.pairwise(advices))
    assert [advice.regime for advice in advices] == sorted(
        (advice.regime for advice in advices), key=["plentiful", "limited", "exhausted"].index
    )


def test_storage():
    """The paper's own: 100B tokens of a vocabulary of 151,646 are 400 GB; half of them copied 200 GB."""
    disk = storage(
        refinement(reference_tokens=0, corpus_tokens=1e11), seq_length=1024, vocab_size=151646, token_outputs=0
    )
    samples = int(1e11) // 1024
    assert disk.corpus == int(4e11) and disk.scores == 8 * samples and disk.selection == 8 * (samples // 2)
    assert disk.refined == pytest.approx(2e11, rel=0.01)
    more = storage(
        refinement(reference_tokens=0, corpus_tokens=1e11), seq_length=1024, vocab_size=32000, token_outputs=2
    )
    assert more.corpus == int(2e11) and more.scores - disk.scores == 4 * 1024 * samples


def test_gpu_hours():
    assert gpu_hours(3.6e18, 1000) == pytest.approx(1.0)  # 1e15 FLOP/s for an hour


def test_the_papers_plan(tmp_path, capsys):
    assert (
        run_plan(*PAPER, "--tflops-per-gpu", 400, "--num-gpus", 8, "--output", tmp_path / "out") == ExitStatus.COMPLETE
    )
    out = capsys.readouterr().out
    assert "| 100,000 |" in " ".join(out.split()) and "45,454" in out and "GPU-hours" in out and "days on 8" in out
    assert (tmp_path / "out" / "plan.md").read_text() == out
    written = json.loads((tmp_path / "out" / "plan.json").read_bytes())
    assert (written["format"], written["version"]) == ("megakd-plan", 1)
    costs = written["costs"]
    assert [int(student["vanilla_kd_steps"]) for student in costs["students"]] == [25000, 45454, 66666]
    assert [int(student["minillm_steps"]) for student in costs["students"]] == [13636, 26785, 42857]
    assert costs["offline_gpu_hours"] == pytest.approx(costs["offline_flops"] / 400e12 / 3600)
    assert costs["ratio_advice"]["epochs"] == pytest.approx(1) and not (tmp_path / "out" / "scaling.png").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to plan"),
        (["--student", "200M"], "--student without --teacher"),
        (["--teacher", "1B"], "--teacher without --student"),
        ([*PAPER, "--ratio", "0"], "--ratio 0.0"),
        ([*PAPER, "--ratio", "1.5"], "--ratio 1.5"),
        ([*PAPER, "--corpus-tokens", "5e9"], "expected at least one sample"),
        ([*PAPER, "--num-gpus", "8"], "--num-gpus without --tflops-per-gpu"),
        ([*PAPER, "--train-iters", "0"], "--train-iters 0"),
        ([*PAPER, "--reference-tokens", "-1"], "--reference-tokens -1"),
        ([*PAPER, "--extrapolate-tokens", "1e12"], "--extrapolate-tokens without --fit"),
        (["--fit", "none.csv"], "none.csv: no such file"),
        (["--fit", "none.csv", "--level", "95"], "--level 95"),
        (["--fit", "none.csv", "--huber-delta", "0"], "--huber-delta 0"),
        (["--fit", "none.csv", "--extrapolate-flops", "-1"], "--extrapolate-flops"),
        (["--fit", "none.csv", "--bootstrap", "-1"], "--bootstrap -1"),
    ],
)
def test_flags_refused(flags, message, capsys):
    assert run_plan(*flags) == ExitStatus.USAGE
    assert message in capsys.readouterr().err


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def law(flops, floor=3.3):
    return floor + 2.19e7 / flops**0.41


def write_run(folder, *, steps=12, tokens_a_step=50_000_000, tail=b"", floor=3.3):
    """What a run leaves that the planner reads: its metrics, and the manifest of its checkpoint."""
    shape = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4).resolve("test")
    size = shape_parameters(shape, 1000)
    checkpoint = folder / f"iter_{steps:07d}"
    checkpoint.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(steps))
    parameters = {
        "iteration": steps, "shape": dataclasses.asdict(shape), "vocab_size": 1000, "seq_length": 64,
        "loader_state": {}, "layout": {}, "use_distributed_optimizer": False, "rng_states": False,
    }  # fmt: skip
    (checkpoint / BACKENDS).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    write_manifest(checkpoint / "manifest.json", format="megakd-checkpoint", version=1, parameters=parameters,
                   parents={}, tokenizer=None, files=[hash_file(checkpoint / BACKENDS)])  # fmt: skip
    lines = []
    for step in range(1, steps + 1):
        tokens = step * tokens_a_step
        lines += [{"step": step, "tokens": tokens, "lm_loss": 9.0}]
        lines += [{"step": step, "valid": {"lm_loss": law(6 * size * tokens, floor)}}] if step % 2 == 0 else []
    (folder / "metrics.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    return size


def test_points_of_runs(tmp_path):
    size = write_run(tmp_path / "a", tail=b'{"step":13,"tok')  # killed while it wrote
    write_run(tmp_path / "b", steps=30)
    (curve,) = read_curves([f"plain={tmp_path / 'a'},{tmp_path / 'b'}"], points="all", from_tokens=0)
    assert curve.name == "plain" and curve.parameters == size and len(curve.loss_n) == 6 + 15
    assert curve.flops_n[0] == 6 * size * 2 * 50_000_000 and curve.loss_n[0] == law(curve.flops_n[0])
    (last,) = read_curves([f"{tmp_path / 'b'}"], points="last", from_tokens=0)
    assert last.name == "b" and last.flops_n.tolist() == [6 * size * 30 * 50_000_000]
    (late,) = read_curves([f"{tmp_path / 'b'}"], points="all", from_tokens=20 * 50_000_000)
    assert len(late.loss_n) == 6 and late.flops_n.min() == 6 * size * 20 * 50_000_000


def test_a_size_by_checkpoint_or_preset(tmp_path, capsys):
    size = write_run(tmp_path / "a")
    assert sized(str(tmp_path / "a")).parameters == size  # with its own vocabulary of 1,000
    flags = ["--student", tmp_path / "a", "miniplm-200m", "--teacher", "1.8B", "--reference", "miniplm-104m"]
    assert run_plan(*flags) == ExitStatus.COMPLETE
    out = capsys.readouterr().out
    assert f"{size:.4g}" in out and "2.034e+08" in out and "1.035e+08" in out
    (tmp_path / "empty").mkdir()
    assert run_plan(*flags, "--proxy", tmp_path / "empty") == ExitStatus.USAGE
    assert "holds no checkpoint" in capsys.readouterr().err


def test_runs_refused(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "empty", "no metrics.jsonl"),
        (tmp_path / "a" / "metrics.jsonl", "give the folder"),
    ):
        with pytest.raises(UsageError, match=message):
            read_curves([str(source)], points="all", from_tokens=0)
    with pytest.raises(UsageError, match="6 evaluations, none of them after 1e\\+12"):
        read_curves([str(tmp_path / "a")], points="all", from_tokens=1e12)
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.write_bytes(b"{}\n" + metrics.read_bytes())
    with pytest.raises(CorruptError, match="line 1 "):
        read_curves([str(tmp_path / "a")], points="all", from_tokens=0)


def test_points_of_csv_files(tmp_path):
    plain = write_csv(tmp_path / "p.csv", ["loss", "flops"], [(3.5, 1e18), (3.4, 2e18)])
    (curve,) = read_curves([str(plain)], points="all", from_tokens=0)
    assert (curve.name, curve.parameters, curve.flops_n.tolist()) == ("p", None, [1e18, 2e18])
    rows = [("x", 1e8, 1e9, 4.0), ("y", 1e8, 1e9, 3.9), ("x", 2e8, 1e9, 3.8)]
    named = write_csv(tmp_path / "n.csv", ["curve", "parameters", "tokens", "loss"], rows)
    x, y = read_curves([str(named)], points="all", from_tokens=0)
    assert (x.name, x.parameters, x.flops_n.tolist()) == ("x", None, [6e17, 1.2e18])
    assert (y.name, y.parameters, y.loss_n.tolist()) == ("y", 1e8, [3.9])
    assert [c.name for c in read_curves([f"run={named}"], points="all", from_tokens=0)] == ["run x", "run y"]


@pytest.mark.parametrize(
    "columns, row, message",
    [
        (["loss", "tokens"], (3, 1e9), "columns loss, tokens; expected loss and flops"),
        (["loss", "flops"], (3, "many"), "line 2: flops is 'many'"),
        (["loss", "flops"], ("nan", 1e18), "line 2: loss is 'nan'"),
        (["loss", "flops"], (3,), "line 2: flops is None"),
    ],
)
def test_csv_files_refused(tmp_path, columns, row, message):
    path = write_csv(tmp_path / "p.csv", columns, [row])
    with pytest.raises(UsageError, match=message):
        read_curves([str(path)], points="all", from_tokens=0)


def test_a_fit_from_runs_and_a_file(tmp_path, capsys):
    size = write_run(tmp_path / "a", steps=40, floor=3.3)
    flops = [6 * size * step * 1e8 for step in range(1, 21)]
    refined = write_csv(tmp_path / "r.csv", ["flops", "loss"], [(value, law(value, 3.2)) for value in flops])
    fits = ["--fit", f"plain={tmp_path / 'a'}", f"refined={refined}", "--bootstrap", 50]
    flags = [*fits, "--extrapolate-flops", 1e18, "--output", tmp_path / "out"]
    assert run_plan(*flags) == ExitStatus.COMPLETE
    out = capsys.readouterr().out
    assert "### plain" in out and "neither a teacher" in out and "L(C) = 3.3000" in out and "L(C) = 3.2000" in out
    assert "To the loss of plain at its last point" in out
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "out" / "plan.json").read_bytes())["curves"]
    assert [curve["name"] for curve in curves] == ["plain", "refined"] and curves[0]["parameters"] == size
    assert curves[1]["law"]["exponent"]["value"] == pytest.approx(0.41, rel=1e-4)
    assert curves[1]["extrapolations"][0]["loss"]["value"] == pytest.approx(law(1e18, 3.2), abs=1e-6)
    assert run_plan(*fits, "--extrapolate-tokens", 1e12) == ExitStatus.USAGE
    assert "add a column parameters" in capsys.readouterr().err
