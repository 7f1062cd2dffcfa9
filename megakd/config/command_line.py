"""The words of a command line as flags with their values, and what another program's flags come to here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Takes = Literal["nothing", "switch", "one", "many"]
"""What stands behind a flag: nothing, perhaps true or false, one word, or all words up to the next flag."""


@dataclass(frozen=True)
class Given:
    """A flag as it was written, and the words that belong to it."""

    name: str
    values: tuple[str, ...] = ()


@dataclass
class Words:
    """A command line taken apart. problems: what is wrong with its form, a phrase each."""

    flags: list[Given] = field(default_factory=list)
    unknown: list[Given] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """What a command says so far, for a dialect to look at.

    flags: all known ones, the dialect's own among them. files: values of the configuration files by their place in the
    tree, read by type.
    """

    flags: Sequence[Given]
    files: Mapping[str, Any]

    def of(self, name: str) -> tuple[str, ...] | None:
        """The words of a flag, the last time it is given; None where it is not."""
        return next((given.values for given in reversed(self.flags) if given.name == name), None)

    def has(self, name: str) -> bool:
        return self.of(name) is not None

    def number(self, name: str, key: str) -> int | None:
        """A whole number that a flag or else a file gives."""
        words = self.of(name)
        if words is None:
            value = self.files.get(key)
            return value if isinstance(value, int) else None
        return int(words[0]) if len(words) == 1 and words[0].isascii() and words[0].isdigit() else None


@dataclass(frozen=True)
class Translation:
    """What stands in for a dialect's flags. refused: a line each. notes: what the user should know, a line each."""

    flags: Sequence[Given] = ()
    refused: Sequence[str] = ()
    notes: Sequence[str] = ()


class Dialect(Protocol):
    """Flags of another program that a command answers for."""

    def takes(self, name: str) -> Takes | None:
        """What stands behind a flag of that program; None for one that it does not know."""

    def reads_itself(self, given: Given) -> bool:
        """Whether the dialect translates this use of a flag that the command has too."""

    def translate(self, line: Line) -> Translation:
        """All of the line's flags that the dialect knows, and those whose use it reads itself, in our own."""


def split_words(words: Sequence[str], takes: Mapping[str, Takes], dialect: Dialect | None = None) -> Words:
    """Take a command line apart. takes: of each known flag, with its dashes."""
    found = Words()
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            found.positionals += words[position:]
            break
        if not word.startswith("--"):
            found.positionals.append(word)
            continue
        name, equals, attached = word.partition("=")
        kind = takes.get(name) or (dialect.takes(name) if dialect else None)
        end = position
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        following = list(words[position:end])
        if kind is None:
            found.unknown.append(Given(name, (attached,) if equals else tuple(following)))
            position = end
            continue
        if equals:
            values = [attached]
        elif kind == "nothing":
            values = []
        elif kind == "switch":
            values = following[:1] if following and following[0].lower() in ("true", "false") else []
        else:
            values = following[:1] if kind == "one" else following
        position += 0 if equals else len(values)
        if kind in ("one", "many") and not values:
            found.problems.append(f"{name}: no value follows; expected {'one' if kind == 'one' else 'at least one'}")
        elif kind == "nothing" and equals:
            found.problems.append(f"{name} is '{attached}'; expected no value: it is a switch")
        else:
            found.flags.append(Given(name, tuple(values)))
    return found
