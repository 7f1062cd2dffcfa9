"""The mechanical part of how we write: docstrings and flags' help that can be read alone, variables that are nouns."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("megakd", "tools") for path in (ROOT / folder).rglob("*.py"))
# A sentence that begins with one of these leans on one that the reader has not seen, or hides its verb.
LEANING = re.compile(r"(Of|The same|Same|As|That|What|Which|Whose|Who|Whether|How|Where|Like|Such|Also|So)\b", re.I)
# Pronouns as variables: one of them may be clear in a function, two are not.
PRONOUNS = {"own", "one", "other", "others", "some", "each", "here", "there", "found", "told", "made", "given", "said"}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def helps(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the help of every ``option(default, help)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option":
            texts = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "help")]
            for text in texts:
                first = text.values[0] if isinstance(text, ast.JoinedStr) and text.values else text
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield node.lineno, first.value


def pronouns(tree: ast.Module) -> Iterator[tuple[int, str, set[str]]]:
    """Functions with the pronouns that they use as names of variables and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
            names |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
            if len(names & PRONOUNS) > 1:
                yield node.lineno, node.name, names & PRONOUNS


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_docstrings_can_be_read_alone() -> None:
    wrong = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for path, tree in trees()
        for line, text in docstrings(tree)
        if LEANING.match(text)
    ]
    assert not wrong, f"{len(wrong)} begin with no verb or noun:\n" + "\n".join(wrong)


def test_help_of_a_flag_begins_with_the_noun_it_is() -> None:
    wrong = [
        f"{path}:{line}: {text}" for path, tree in trees() for line, text in helps(tree) if LEANING.match(text.strip())
    ]
    assert not wrong, "\n".join(wrong)


def test_variables_are_nouns() -> None:
    wrong = [
        f"{path}:{line}: {name}: {', '.join(sorted(names))}"
        for path, tree in trees()
        for line, name, names in pronouns(tree)
    ]
    assert not wrong, f"{len(wrong)} functions with more than one pronoun:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "text", ["Of ids: as they are.", "The same for a known model.", "What was said.", "of the draws"]
)
def test_leaning_sentences_are_noticed(text: str) -> None:
    assert LEANING.match(text)


@pytest.mark.parametrize("text", ["Offsets of rows.", "Assert nothing.", "Whatever", "seed of the draws", "Sort rows."])
def test_others_are_not(text: str) -> None:
    assert not LEANING.match(text)
