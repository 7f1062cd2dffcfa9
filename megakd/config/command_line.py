"""Command line as flags with their values, and the interface by which another program's flags are translated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Takes = Literal["nothing", "switch", "one", "many"]
"""Form of a flag's value: none, an optional true or false, one word, or all words up to the next flag."""


@dataclass(frozen=True)
class Given:
    """A flag as it was written, and the words that belong to it."""

    name: str
    values: tuple[str, ...] = ()


@dataclass
class Words:
    """A command line taken apart. problems: errors of its form, a phrase each."""

    flags: list[Given] = field(default_factory=list)
    unknown: list[Given] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """Flags and files of a command, for a dialect to translate.

    flags: all known flags, with the dialect's own. files: values of the configuration files by their place in the tree,
    read by the types of their options.
    """

    flags: Sequence[Given]
    files: Mapping[str, Any]

    def of(self, name: str) -> tuple[str, ...] | None:
        """Return the words behind a flag, where it is given last; None if it is not given."""
        return next((given.values for given in reversed(self.flags) if given.name == name), None)

    def has(self, name: str) -> bool:
        """Return True if the flag is given."""
        return self.of(name) is not None

    def number(self, name: str, key: str) -> int | None:
        """Return the whole number that a flag or else a file gives; None if neither does."""
        words = self.of(name)
        if words is None:
            value = self.files.get(key)
            return value if isinstance(value, int) else None
        return int(words[0]) if len(words) == 1 and words[0].isascii() and words[0].isdigit() else None


@dataclass(frozen=True)
class Translation:
    """Flags that replace a dialect's. refused: reasons for refusals; notes: information for the user; a line each."""

    flags: Sequence[Given] = ()
    refused: Sequence[str] = ()
    notes: Sequence[str] = ()


class Dialect(Protocol):
    """Flags of another program that a command understands."""

    def takes(self, name: str) -> Takes | None:
        """Return the form of the value of a flag of that program; None for an unknown flag."""

    def reads_itself(self, given: Given) -> bool:
        """Return True if the dialect translates this use of a flag that the command has too."""

    def translate(self, line: Line) -> Translation:
        """Translate the line's flags that only the dialect knows, and the uses for which `reads_itself` is True."""


def split_words(words: Sequence[str], takes: Mapping[str, Takes], dialect: Dialect | None = None) -> Words:
    """Take a command line apart. takes: form of the value of each known flag, whose name has its dashes."""
    parts = Words()
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            parts.positionals += words[position:]
            break
        if not word.startswith("--"):
            parts.positionals.append(word)
            continue
        name, equals, attached = word.partition("=")
        kind = takes.get(name) or (dialect.takes(name) if dialect else None)
        end = position
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        following = list(words[position:end])
        if kind is None:
            parts.unknown.append(Given(name, (attached,) if equals else tuple(following)))
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
            parts.problems.append(f"{name}: no value follows; expected {'one' if kind == 'one' else 'at least one'}")
        elif kind == "nothing" and equals:
            parts.problems.append(f"{name} is '{attached}'; expected no value: it is a switch")
        else:
            parts.flags.append(Given(name, tuple(values)))
    return parts
