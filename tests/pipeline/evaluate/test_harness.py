"""Tasks of lm-eval under our model: the answers of the harness's own back-end on the same weights, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline.evaluate.evaluate_runs import results_in, run_evaluate
from pipeline.evaluate.transformers_twin import make_both, samples_of_hf
from runs import write_dataset
from tokenizer_models import train_byte_bpe
from worlds import RankError, Worlds

from megakd.errors import MismatchError, UsageError
from megakd.pipeline.evaluate.main import main

TASKS = ["local_choices", "local_shots", "local_words", "local_texts"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder with both forms of a model, and what lm-eval's own back-end makes of the one."""
    for package in ("lm_eval", "transformers", "accelerate"):  # the last two for the harness's own back-end
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("both")
    make_both(folder, world)
    ((samples, results),) = world(1).run(samples_of_hf, folder, TASKS)
    return folder, samples, results


def samples_in(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"*-{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((1, 1, 1), id="1"),
        pytest.param((4, 2, 1), id="TP2 DP2"),
        pytest.param((4, 2, 2), id="TP2 PP2", marks=pytest.mark.long),
    ],
)
def test_answers_are_those_of_the_harness_itself(
    both: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path, world: Worlds, layout: tuple[int, int, int]
) -> None:
    folder, theirs, their_results = both
    ranks, tensor, pipeline = layout
    tree = {
        "load": str(folder / "run"), "tasks": TASKS, "include_path": [str(folder / "tasks")], "output": str(tmp_path),
        "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "log_samples": True,
        "bootstrap_iters": 10,
    }  # fmt: skip
    printed = world(ranks).run(run_evaluate, tree)
    results = results_in(tmp_path)["lm_eval"]
    count = 0
    for task in TASKS:
        ours = samples_in(tmp_path, task)
        assert len(ours) == len(theirs[task]) == 24
        for mine, other in zip(ours, theirs[task]):
            assert mine["doc_id"] == other["doc_id"] and mine["arguments"] == other["arguments"]
            for (answer,), (expected,) in zip(mine["resps"], other["resps"]):
                count += 1
                if isinstance(expected, list):
                    assert answer[1] == expected[1]
                    assert answer[0] == pytest.approx(expected[0], abs=1e-4)
                else:  # of a whole text: the harness adds up hundreds of nats in fp32
                    assert answer == pytest.approx(expected, rel=1e-6)
            assert [mine.get(key) for key in ("acc", "acc_norm")] == [other.get(key) for key in ("acc", "acc_norm")]
        for key, value in results["tasks"][task]["metrics"].items():
            if "stderr" not in key:
                assert value == pytest.approx(their_results[task][f"{key},none"], rel=1e-4), key
    assert count == 24 * 2 + 2 * 24 * 3
    assert "local_choices" in printed[0] and not "".join(printed[1:])
    mean = (
        results["tasks"]["local_choices"]["metrics"]["acc_norm"]
        + sum(results["tasks"][task]["metrics"]["acc"] for task in ("local_shots", "local_words"))
    ) / 3
    assert results["mean"]["value"] == pytest.approx(mean)


@pytest.mark.slow
def test_ready_requests_have_the_same_answers(
    both: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path, world: Worlds
) -> None:
    """The harness's requests as a file of their own: its answers again, on two copies of the model."""
    folder, theirs, _ = both
    lines = [
        {"doc_id": sample["doc_id"], "idx": i, "context": context, "continuation": continuation, "label": label}
        for sample in theirs["local_choices"]
        for label in [int(sample["target"])]
        for i, (context, continuation) in enumerate(sample["arguments"])
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {"load": str(folder / "run"), "requests": [str(path)], "output": str(tmp_path / "out"), "log_samples": True}
    world(2).run(run_evaluate, tree)
    metrics = results_in(tmp_path / "out")["requests"]["quiz"]["metrics"]
    ours = samples_in(tmp_path / "out", "quiz")
    for mine, other in zip(ours, theirs["local_choices"], strict=True):
        for answer, greedy, (expected,) in zip(mine["log_probs"], mine["is_greedy"], other["resps"], strict=True):
            assert answer == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert metrics["acc"] == sum(sample["acc"] for sample in theirs["local_choices"]) / 24


@pytest.mark.slow
def test_what_cannot_be_scored_is_refused_on_every_rank(
    both: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path, world: Worlds
) -> None:
    folder = both[0]
    task = json.loads((folder / "tasks" / "local_words.yaml").read_text())
    task |= {"task": "local_writes", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_writes.yaml").write_text(json.dumps(task))
    tree = {
        "load": str(folder / "run"), "tasks": ["local_writes"], "include_path": [str(tmp_path / "tasks")],
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    with pytest.raises(RankError, match="generate_until") as error:
        world(2).run(run_evaluate, tree)
    assert str(error.value).count("UsageError: --tasks local_writes") == 2
    long = {"doc_id": 0, "idx": 0, "label": 0, "request": {"context": "a", "continuation": " word" * 300}}
    (tmp_path / "long.jsonl").write_text(json.dumps(long))
    tree = {"load": str(folder / "run"), "requests": [str(tmp_path / "long.jsonl")], "output": str(tmp_path / "out")}
    with pytest.raises(RankError, match="request 0 has") as error:
        world(2).run(run_evaluate, tree)
    assert str(error.value).count("UsageError: request 0 has") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_harness_itself_runs_the_model_by_its_name(
    both: tuple[Path, dict[str, Any], dict[str, Any]], world: Worlds
) -> None:
    """As ``lm_eval --model megakd --model_args load=...`` does, after an import that registers it."""
    folder, theirs, _ = both
    ((samples,),) = [world(1).run(samples_by_name, folder)]
    for mine, other in zip(samples["local_choices"], theirs["local_choices"], strict=True):
        assert [answer[0][0] for answer in mine["resps"]] == pytest.approx(
            [answer[0][0] for answer in other["resps"]], abs=1e-4
        )


def samples_by_name(folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import megakd.pipeline.evaluate.harness  # noqa: F401

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    arguments = f"load={folder / 'run'},seq_length=48,transformer_impl=local"
    found = simple_evaluate(
        model="megakd", model_args=arguments, tasks=["local_choices"], task_manager=manager, batch_size=2
    )
    assert found is not None
    samples: dict[str, Any] = json.loads(json.dumps(found["samples"], default=str))
    return samples


@pytest.mark.slow
def test_refusals(both: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    folder = both[0]
    run = ["--load", str(folder / "run")]

    def refused(*flags: str, match: str, error: type[ValueError] = UsageError) -> None:
        with pytest.raises(error, match=match):
            main([*run, *flags])

    refused(match="nothing to evaluate")
    refused("--tasks", "a", "--eval-samples", "3", match="--eval-samples is for held-out data")
    refused("--data-path", str(folder / "text"), "--limit", "3", match="--limit is for tasks and requests")
    (tmp_path / "file").write_text("")
    text = str(folder / "text")
    refused("--data-path", text, "--output", str(tmp_path / "file"), match="is a file; expected a folder")
    refused("--data-path", "a", "--valid-data-path", "b", match="are one flag here")
    refused("--requests", str(tmp_path / "none.jsonl"), match="no such file")
    refused("--data-path", str(folder / "text"), "--tensor-model-parallel-size", "3", match="world size 1")
    other = write_dataset(tmp_path / "ids")
    refused("--data-path", other, match="different tokenizers", error=MismatchError)
    another = train_byte_bpe(tmp_path / "another", vocab_size=590)
    refused("--tasks", "a", "--tokenizer-model", str(another), match="different tokenizers", error=MismatchError)
    monkeypatch.setattr("megakd.pipeline.evaluate.preflight.find_spec", lambda name: None)
    refused("--tasks", "hellaswag", match=r"pip install 'megakd\[eval\]'")
