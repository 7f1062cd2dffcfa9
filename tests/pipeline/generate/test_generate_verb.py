"""``megakd generate``: prompts in, texts out, alone and on several ranks; what cannot work is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from model.huggingface.folders import Case, write_folder
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.tokenizer import ByteTokenizer
from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import MANIFEST, read_record
from megakd.pipeline.generate.config import GenerateConfig
from megakd.pipeline.generate.preflight import check_generate
from megakd.pipeline.generate.text import TextStream, text_behind

PROMPTS = ["abc", "The sea is", "é", "abc"]
SEQ = 24


@pytest.fixture(scope="module")
def model(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a model over bytes that has learnt a little."""
    folder = tmp_path_factory.mktemp("generate")
    data = write_dataset(folder / "data", tokenizer=ByteTokenizer().describe())
    tree = make_tree(data, training={"train_iters": 20}, checkpoint={"save": str(folder / "model")})
    tree["data"]["seq_length"] = SEQ
    tree["student"]["init_method_std"] = 0.2
    assert world(1).run(run_training, tree) == [0]
    return str(folder / "model")


def run_verb(*argv: str) -> tuple[int, str, str]:
    """Exit status and what the verb prints; in a world."""
    from megakd.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["generate", *argv])
    return status, out.getvalue(), err.getvalue()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def twin(load: str, prompts: list[str], new: int) -> list[list[int]]:
    """Greedy bytes, each by a forward pass over all before it."""
    import torch

    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    record = read_record(load)
    groups = init_parallel(ParallelConfig(), seed=1)
    (model,) = build_model(record.shape, groups, vocab_size=257, seq_length=SEQ)
    load_weights(record, [model], groups)
    texts = []
    for prompt in prompts:
        ids = list(prompt.encode())
        for _ in range(min(new, SEQ - len(prompt.encode()))):
            with torch.no_grad():
                hidden = model.eval()(torch.tensor([ids]), None, None)[-1, 0]
                token = int((hidden @ model.output_weight().t())[:257].argmax())
            if token == 256:
                break
            ids.append(token)
        texts.append(ids[len(prompt.encode()) :])
    return texts


@pytest.mark.slow
def test_texts_equal_the_twin_in_order_of_the_prompts(model: str, world: Worlds, tmp_path: Path) -> None:
    file, single, split = tmp_path / "prompts.jsonl", tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    words = ("--load", model, "--prompts-file", str(file), "--num-tokens-to-generate", "16")
    ((status, out, err),) = world(1).run(run_verb, *words, "--micro-batch-size", "3", "--output", str(single))
    assert status == 0 and not out and "tokens/s" in err
    (expected,) = world(1).run(twin, model, PROMPTS, 16)
    found = records(single)
    assert [record["tokens"] for record in found] == expected
    assert [record["prompt"] for record in found] == PROMPTS
    assert all(len(record["log_probs"]) == len(record["tokens"]) for record in found)
    assert "1 of 4 texts end earlier than asked" in err, "the second prompt leaves 14 positions"
    # two copies of the model, and two tensor-parallel ranks
    for number, layout in enumerate([(), ("--tensor-model-parallel-size", "2")]):
        (first, second) = world(2).run(run_verb, *words, *layout, "--micro-batch-size", "1", "--output", str(split))
        assert first[0] == second[0] == 0 and not second[1] and not second[2], number
        assert [record["tokens"] for record in records(split)] == expected
        split.unlink()


@pytest.mark.slow
def test_the_text_of_one_prompt_is_printed_as_it_comes(model: str, world: Worlds) -> None:
    words = ("--load", model, "--num-tokens-to-generate", "9", "--temperature", "1", "--ignore-eod")
    ((status, first, _),) = world(1).run(run_verb, *words, "--prompt", "abc")
    ((_, again, _),) = world(1).run(run_verb, *words, "--prompt", "abc")
    ((_, other, _),) = world(1).run(run_verb, *words, "--prompt", "abc", "--seed", "8")
    ((_, several, _),) = world(1).run(run_verb, *words, "--prompt", "x", "abc")
    assert status == 0 and first.startswith("abc") and len(first) > 5
    assert first == again != other
    assert several.startswith("--- 1 of 2\nx") and several.endswith(f"--- 2 of 2\n{first}")


def check(model: str, **flags: Any) -> Any:
    config = GenerateConfig(**({"load": model, "prompt": ["abc"]} | flags))
    config.validate()
    return check_generate(config, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"prompt": ["a", ""]}, UsageError, "prompt 2 is '', which has no token"),
        ({"prompt": ["a" * SEQ]}, UsageError, f"has {SEQ} tokens .* the model {SEQ} positions.* --seq-length"),
        ({"prompt": ["a", "b\udcff"]}, UsageError, r"prompt 2 is 'b.udcff', which is no UTF-8 from character 2 on"),
        ({"prompt": []}, UsageError, "nothing to continue"),
        ({"prompts_file": "x"}, UsageError, "--prompt and --prompts-file: one"),
        ({"prompt": [], "prompts_file": "/nowhere/x"}, UsageError, "--prompts-file /nowhere/x: cannot be read"),
        ({"temperature": -1.0}, UsageError, "--temperature is -1.0; expected 0"),
        ({"temperature": 0.0, "top_p": 0.5}, UsageError, "--temperature 0 takes the most probable"),
        ({"top_p": 0.0}, UsageError, "--top-p is 0.0; expected a share above 0"),
        ({"top_k": -2}, UsageError, "--top-k is -2"),
        ({"num_tokens_to_generate": 0}, UsageError, "--num-tokens-to-generate is 0"),
        ({"tensor_model_parallel_size": 3}, UsageError, "world size 1 is not a multiple"),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 4}, MismatchError, "the one given is NullTokenizer"),
    ],
)
def test_refusals(model: str, flags: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(model, **flags)


@pytest.mark.slow
def test_a_prompt_that_fits_may_use_the_positions_that_are_left(model: str) -> None:
    plan = check(model, prompt=["a" * (SEQ - 3), "b"], num_tokens_to_generate=5)
    assert [prompt.max_new_tokens for prompt in plan.prompts] == [3, 5] and plan.cut == 1
    assert plan.stop_ids == {256} and check(model, ignore_eod=True).stop_ids == frozenset()
    assert check(model, prompt=["a" * SEQ], seq_length=SEQ + 7).prompts[0].max_new_tokens == 7


@pytest.mark.slow
def test_a_model_without_a_record(model: str, tmp_path: Path) -> None:
    path = tmp_path / "iter_0000020"
    shutil.copytree(read_record(model).path, path)
    (path / MANIFEST).unlink()
    shape = tmp_path / "model.yaml"
    student = make_tree("")["student"] | {"init_method_std": 0.2}
    shape.write_text(json.dumps({"student": student}))  # JSON is YAML
    flags = {"load": str(tmp_path), "model_config": str(shape)}
    with pytest.raises(UsageError, match="its tokenizer is not recorded"):
        check(model, **flags)
    plan = check(model, **flags, tokenizer_type="ByteTokenizer")
    assert plan.record.vocab_size == 257 and plan.prompts[0].max_new_tokens == 100
    with pytest.raises(MismatchError, match="embedding of 260 rows, the vocabulary of the data is 1001"):
        check(model, **flags, tokenizer_type="NullTokenizer", vocab_size=1000, prompt=["7"])


@pytest.mark.parametrize(
    ("flags", "drawn_at"),
    [({}, None), ({"top_k": 5}, 1.0), ({"top_p": 0.5}, 1.0), ({"temperature": 0.0}, None), ({"temperature": 2.0}, 2.0)],
)
def test_temperature_that_flags_mean(flags: dict[str, Any], drawn_at: float | None) -> None:
    assert GenerateConfig(load="x", prompt=["a"], **flags).drawn_at == drawn_at


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream(ByteTokenizer(), list(b"ab"))
    ids = list("cé€".encode())
    pieces = [stream.piece(ids[: count + 1]) for count in range(len(ids))]
    assert pieces == ["c", "", "é", "", "", "€"]
    assert stream.piece([*ids, 0xC3]) == "" and stream.piece([*ids, 0xC3], ended=True) == "\N{REPLACEMENT CHARACTER}"
    assert text_behind(ByteTokenizer(), list(b"ab"), ids) == "cé€"


@pytest.fixture
def mistral(tmp_path: Path) -> str:
    """A folder with a sliding window of 12 tokens, 64 positions, and a tokenizer that begins a text with ``<s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path / "mistral"
    write_folder(folder, Case("mistral", keys={"sliding_window": 12}))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 131)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return str(folder)


@pytest.mark.slow
def test_a_model_with_a_sliding_window_writes_within_it(mistral: str, world: Worlds) -> None:
    with pytest.raises(UsageError, match="sequences of 13 tokens, .* sliding window of 12 .*--seq-length 12 or less"):
        check(mistral, prompt=["w3"], seq_length=13)
    assert check(mistral, prompt=["w3"], seq_length=9).positions == 9
    ((status, text, told),) = world(1).run(run_verb, "--load", mistral, "--prompt", "w3 w4", "--ignore-eod")
    assert (status, len(text.split())) == (0, 2 + 9)  # the window has room for <s>, the prompt and nine more
    assert "1 of 1 texts end earlier than asked" in told


@pytest.mark.slow
def test_a_prompt_begins_as_the_tokenizers_template_has_it(mistral: str) -> None:
    prompts = ["w3 w4", "<s> w3 w4"]
    for add, expected in ((None, [(1, 3, 4), (1, 3, 4)]), (True, [(1, 3, 4)] * 2), (False, [(3, 4), (1, 3, 4)])):
        assert [prompt.ids for prompt in check(mistral, prompt=prompts, add_bos_token=add).prompts] == expected
