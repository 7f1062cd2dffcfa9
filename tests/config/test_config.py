"""The configuration tree: defaults, YAML, flags, and what is refused."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megakd.__main__ import run as run_verb
from megakd.config.suggestions import near_names
from megakd.config.tree import dump, from_dict, group, option, parse, to_dict
from megakd.errors import UsageError


@dataclass
class Model:
    num_layers: int = option(2, "layers", common=True)
    rope_scaling: float | None = option(None, "factor")


@dataclass
class Optim:
    lr: float = option(1e-3, "peak", common=True)
    style: Literal["cosine", "WSD"] = option("cosine", "shape")
    overlap: bool = option(False, "overlap")

    def validate(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"--lr is {self.lr}; expected a positive number")


@dataclass
class Root:
    name: str = option(..., "a name")
    data_path: list[str] = option([], "weights and prefixes")
    student: Model = group(Model, "student")
    teacher: Model = group(Model, "teacher", flag_prefix="teacher-")
    optim: Optim = group(Optim, "optimizer")


def run(*argv: str) -> Root:
    return parse(Root, argv, prog="megakd test", description="test")


def test_yaml_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: a\ndata_path: ['0.3', p]\nteacher: {num_layers: 9}\noptim: {lr: 0.5, style: WSD}\n")
    config = run("--config", str(file), "--lr", "1e-2", "--num-layers", "3", "--overlap")
    assert config.optim.lr == 1e-2 and config.optim.style == "WSD" and config.optim.overlap is True
    assert config.student.num_layers == 3 and config.teacher.num_layers == 9
    assert config.data_path == ["0.3", "p"] and config.student.rope_scaling is None


def test_flags_of_every_kind() -> None:
    config = run("--name", "x", "--data-path", "1", "a", "2", "b", "--teacher-rope-scaling", "8", "--overlap", "false")
    assert config.data_path == ["1", "a", "2", "b"] and config.teacher.rope_scaling == 8.0
    assert config.optim.overlap is False


def test_dump_reads_back(tmp_path: Path) -> None:
    config = run("--name", "x", "--data-path", "a", "--lr", "0.25")
    file = tmp_path / "c.yaml"
    file.write_text(dump(config))
    assert run("--config", str(file)) == config
    assert from_dict(Root, to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {learning_rate: 1}", "optim.learning_rate"),
        ("optim: {lrr: 1}", "did you mean 'optim.lr'"),
        ("zzz: 1", "zzz"),
        ("optim: {style: step}", "style"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: -1}", "positive"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: a\n" + text + "\n")
    with pytest.raises(UsageError, match=expected):
        run("--config", str(file))


@dataclass
class Files:
    adopt: bool = option(False, "adopt")
    prefix: list[str] = option(..., "prefixes", positional=True)


@pytest.mark.parametrize("words", [["--adopt", "a", "b"], ["a", "b", "--adopt"], ["--adopt", "true", "a", "b"]])
def test_a_switch_leaves_the_next_word_alone(words: list[str]) -> None:
    config = parse(Files, words, prog="megakd test", description="test")
    assert config == Files(adopt=True, prefix=["a", "b"])


@pytest.mark.parametrize("content", [b"optim: 3\n", b"\xff\xfe\x00", b"a: [1\n", b"- 1\n"])
def test_files_that_are_no_tree(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UsageError):
        run("--name", "x", "--config", str(tmp_path / "c.yaml"))


def test_numbers_must_be_finite() -> None:
    with pytest.raises(UsageError, match="--lr is inf; expected a finite number"):
        run("--name", "x", "--lr", "1e400")
    with pytest.raises(UsageError, match="lr"):
        run("--name", "x", "--lr", "nan")


def test_refused_flags() -> None:
    with pytest.raises(UsageError, match=r"--lr"):
        run("--name", "x", "--lrs", "1")
    with pytest.raises(UsageError, match="missing: --name"):
        run()
    with pytest.raises(UsageError):
        run("--name", "x", "--config", "/nonexistent.yaml")


def test_help_shows_common_then_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    short = capsys.readouterr().out
    assert stop.value.code == 0 and "--num-layers" in short and "--rope-scaling" not in short
    with pytest.raises(SystemExit):
        run("--help-all")
    assert "--teacher-rope-scaling" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--print-config", "--lr", "2")
    assert "lr: 2.0" in capsys.readouterr().out


@dataclass
class Switches:
    untie: bool | None = option(None, "switch whose default depends on others")
    lr: float = option(1.0, "peak")
    seed: int = option(1, "seed")
    data_path: list[str] = option([], "prefixes")


@pytest.mark.parametrize(
    ("words", "expected"), [([], None), (["--untie"], True), (["--untie", "false"], False), (["--untie=no"], False)]
)
def test_switches_of_three_states_stand_alone(words: list[str], expected: bool | None) -> None:
    for line in (words, [*words, "--lr", "2"], ["--lr", "2", *words]):
        assert parse(Switches, line, prog="megakd test", description="").untie is expected


def test_every_unknown_flag_is_named_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        parse(
            Switches,
            ["--mock-data", "--learning-rate", "1", "--sead", "3", "--lr", "fast", "--Data_Path", "a", "--seed"],
            prog="megakd test",
            description="",
        )
    assert str(refused.value).splitlines() == [
        "megakd test: 6 errors (see megakd test --help-all):",
        "  --seed: no value follows; expected one",
        "  --lr is fast; expected a number",
        "  unknown flag '--mock-data'",
        "  unknown flag '--learning-rate'; did you mean '--lr'?",
        "  unknown flag '--sead'; did you mean '--seed'?",
        "  unknown flag '--Data_Path'; did you mean '--data-path'?",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["word"], "unexpected word 'word'"),
        (["--lr", "1", "2"], "unexpected word '2'"),
        (["--seed", "1e3"], "--seed is 1e3; expected a whole number"),
        (["--seed", "null"], "--seed is null"),
        (["--untie=perhaps"], "--untie is perhaps; expected true or false or null"),
        (["--data-path"], "--data-path: no value follows; expected at least one"),
        (["--lr"], "--lr: no value follows"),
        (["--config"], "--config: no value follows"),
    ],
)
def test_words_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(Switches, words, prog="megakd test", description="")


def test_a_name_is_suggested_only_where_there_is_little_doubt() -> None:
    known = ["--lr", "--min-lr", "--seed", "--data-path", "--valid-data-path", "--adam-beta1", "--adam-beta2"]
    known += ["--tensor-model-parallel-size", "--kd-ab-beta", "--clip-grad", "--split", "--save"]
    near = {
        "--lrs": ["--lr"],
        "--dat-path": ["--data-path"],
        "--train-data-path": [],  # one letter group away from --valid-data-path, and something else
        "--mock-data": [],
        "--tp-size": ["--tensor-model-parallel-size"],
        "--Valid_Data_Path": ["--valid-data-path"],
        "--adam-beta3": ["--adam-beta1", "--adam-beta2"],
        "--gradient-clipping": ["--clip-grad"],
        "--slpit": ["--split"],
        "--x": [],
    }
    assert {name: near_names(name, known) for name in near} == near


@pytest.mark.filterwarnings("always")
def test_warnings_are_one_line_without_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        warnings.warn("no manifest;\n  made elsewhere", stacklevel=1)
        return 0

    assert run_verb(main) == 0
    assert capsys.readouterr().err == "warning: no manifest; made elsewhere\n"
