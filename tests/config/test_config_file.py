"""YAML files: values mean what they look like, or are refused in one line that names file, line and key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megakd.config.tree import group, option, parse
from megakd.config.yaml_file import MAX_DEPTH, MAX_VALUES
from megakd.errors import UsageError


@dataclass
class Model:
    num_layers: int = option(2, "layers")
    ffn: int | None = option(None, "width")
    bf16: bool = option(False, "precision")


@dataclass
class Optim:
    lr: float = option(1e-3, "peak")
    save: str | None = option(None, "folder")
    label: str = option("x", "a word")


@dataclass
class Root:
    data_path: list[str | float] = option([], "weights and prefixes")
    student: Model = group(Model, "student")
    optim: Optim = group(Optim, "optimizer")


def read(tmp_path: Path, *texts: str | bytes) -> Root:
    words = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        words += ["--config", str(tmp_path / f"{number}.yaml")]
    return parse(Root, words, prog="megakd test", description="test")


MEANS: dict[str, Any] = {
    "student: {num_layers: 010}": ("student.num_layers", 10),  # YAML 1.1 says 8
    "student: {num_layers: 1_000}": ("student.num_layers", 1000),
    "student: {num_layers: +3}": ("student.num_layers", 3),
    "student: {bf16: yes}": ("student.bf16", True),
    "student: {bf16: Off}": ("student.bf16", False),
    "student: {ffn: ~}": ("student.ffn", None),
    "student:\n": ("student.num_layers", 2),
    "student: null\n": ("student.num_layers", 2),
    "optim: {lr: 1e-4}": ("optim.lr", 1e-4),  # YAML 1.1 says it is text
    "optim: {lr: .5}": ("optim.lr", 0.5),
    "optim: {save: yes}": ("optim.save", "yes"),
    "optim: {save: 12:30}": ("optim.save", "12:30"),  # YAML 1.1 says 750
    "optim: {save: 2024-01-02}": ("optim.save", "2024-01-02"),
    "optim: {save: 0x10}": ("optim.save", "0x10"),
    "optim: {save: 1.50}": ("optim.save", "1.50"),
    "optim: {save: 'null'}": ("optim.save", "null"),
    "data_path: x": ("data_path", ["x"]),
    "data_path: [0.30, x]": ("data_path", ["0.30", "x"]),
    "student: &m {num_layers: 7}\n": ("student.num_layers", 7),
    "": ("student.num_layers", 2),
    "# nothing\n": ("student.num_layers", 2),
    "\ufeffoptim: {lr: 3}": ("optim.lr", 3.0),
    "data_path: &d [a, b]\noptim: {label: w}\n": ("data_path", ["a", "b"]),
}


@pytest.mark.parametrize("text", MEANS)
def test_values_mean_what_they_look_like(tmp_path: Path, text: str) -> None:
    key, expected = MEANS[text]
    found: Any = read(tmp_path, text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected and type(found) is type(expected)


LAUGHS = "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
REFUSED: dict[str | bytes, str] = {
    "optim: {lr: 1}\noptim: {lr: 2}": "line 2: 'optim' is given twice (first in line 1)",
    "optim: {lr: 1, lr: 1}": "'lr' is given twice",
    "optim:\n  lr: 1\n  'lr': 2\n": "line 3: 'lr' is given twice",
    "student: &a {ffn: 1}\noptim: {<<: *a, <<: *a}": "'<<' is given twice",
    "optim: {<<: 3}": "'<<' takes a group",
    "student: {num_layers: 12:30}": "student.num_layers is 12:30; expected a whole number",
    "student: {num_layers: 1e3}": "student.num_layers is 1e3; expected a whole number",
    "student: {num_layers: 2.0}": "student.num_layers is 2.0",
    "student: {num_layers: true}": "student.num_layers is true",
    "student: {num_layers: [2]}": "student.num_layers is [2]; expected a whole number",
    "student: {num_layers: {a: 2}}": "student.num_layers is a group of keys",
    "student: {num_layers: null}": "student.num_layers is null; expected a whole number",
    "student: {num_layers: }": "student.num_layers is null",
    "student: {num_layers: 99999999999999999999}": "num_layers is 99999999999999999999; expected a whole number",
    "student: {ffn: 0x10}": "student.ffn is 0x10; expected a whole number, at most 9223372036854775807 or null",
    "student: {bf16: 1}": "student.bf16 is 1; expected true or false",
    "student: {bf16: ~}": "student.bf16 is null; expected true or false",
    "optim: {lr: fast}": "optim.lr is fast; expected a number",
    "optim: {lr: .inf}": "optim.lr is .inf",
    "optim: {lr: 2024-01-02}": "optim.lr is 2024-01-02",
    "optim: {lr: no}": "optim.lr is no; expected a number",
    "optim: {label: null}": "optim.label is null; expected text",
    "optim: 3": "configuration group 'optim' is 3; expected keys",
    "optim: [1]": "configuration group 'optim' is [1]",
    "data_path: null": "data_path is null; expected a list",
    "data_path: [a, null]": "data_path is null",
    "data_path: {a: 1}": "data_path is a group of keys",
    "optim.lr: 1": "unknown configuration key 'optim.lr'",  # a group in two places
    "lr: 1": "unknown configuration key 'lr'; did you mean 'optim.lr'?",
    "optim: {learning-rate: 1}": "did you mean 'optim.lr'?",
    "1: 2": "unknown configuration key '1'",
    "? [a]\n: 1": "a list or a group as a key",
    "- 1\n": "the file is a list; expected groups and keys",
    "just text": "the file is a single value",
    "optim: {lr: 1}\n---\noptim: {lr: 2}\n": "line 2: a second document",
    "optim: !!python/object/apply:os.system ['true']": "the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    "optim: {lr: !!int 3}": "is not read; expected plain values without tags",
    "optim: {lr: *nowhere}": "'*nowhere' refers to nothing above it",
    "optim: &a {lr: *a}": "'*a' refers to what it stands in",
    LAUGHS: f"more than {MAX_VALUES} values, references followed",
    "[" * 200_000: f"more than {MAX_DEPTH} levels deep",
    "optim:\n\tlr: 1\n": "not YAML: found character '\\t' that cannot start any token",
    "optim: {lr: 1": "not YAML",
    "optim: {lr: 1\u0000}": "not YAML",
    b"optim: {label: \xff}": "byte 15 is not UTF-8 text",
    b"\xff\xfeo\x00": "byte 0 is not UTF-8",
    b"#" * (5 << 20): "larger than 4 MiB",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:40]))
def test_what_is_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, text)
    message = str(refused.value)
    assert REFUSED[text] in message and "0.yaml" in message and "\n" not in message
    assert not any(word in message for word in ("jsonargparse", "Parser key", "class_path", "Traceback"))


def test_all_errors_of_a_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"3 errors(.|\n)*optim.lr is fast(.|\n)*'zzz'(.|\n)*num_layers is null"):
        read(tmp_path, "optim: {lr: fast}\nzzz: 1\nstudent: {num_layers: null}\n")


def test_a_later_file_says_more(tmp_path: Path) -> None:
    found = read(tmp_path, "optim: {lr: 1, save: a}\ndata_path: [a]", "optim: {lr: 2}\ndata_path: [b]")
    assert (found.optim.lr, found.optim.save, found.data_path) == (2.0, "a", ["b"])


def test_merged_keys_count_less_than_own(tmp_path: Path) -> None:
    found = read(tmp_path, "optim: &o {lr: 5, save: a}\n", "optim: {<<: [{lr: 6}, {lr: 7, save: b}], save: c}\n")
    assert (found.optim.lr, found.optim.save) == (6.0, "c")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "shut.yaml").write_text("")
    (tmp_path / "shut.yaml").chmod(0)
    shut = [] if os.getuid() == 0 else [str(tmp_path / "shut.yaml")]
    for path in [str(tmp_path / "none.yaml"), str(tmp_path), "a\0b", *shut]:
        with pytest.raises(UsageError, match="--config"):
            parse(Root, ["--config", path], prog="megakd test", description="")
