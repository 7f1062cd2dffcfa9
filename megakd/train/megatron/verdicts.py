"""Answers to a flag of Megatron-LM that is not ours: accepted without effect, translated, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megakd.config.command_line import Given, Line, Takes

Reader = Callable[[tuple[str, ...], Line], "Reading"]
"""Function from the words behind a flag, and the whole line, to the flag's meaning here."""


@dataclass(frozen=True)
class Reading:
    """Meaning of one use of a flag: our flags, or the reason why it is refused. note: a line for the user."""

    flags: Sequence[Given] = ()
    refused: str = ""
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of the table. text: the meaning, or the reason. read: returns the meaning of one use."""

    flag: str
    verdict: Literal["same", "means", "refused"]
    text: str
    takes: Takes
    read: Reader
    values: tuple[str, ...] = ()


def same(flag: str, text: str, *, takes: Takes = "nothing", told: bool = False) -> Entry:
    """Make the row of a flag that is the case here anyway, or does not change the result.

    told: mention the text in a run's notes.
    """
    return Entry(flag, "same", text, takes, lambda values, line: Reading(note=text if told else ""))


def same_for(flag: str, values: str, text: str, otherwise: str, *, takes: Takes = "one") -> Entry:
    """Make the row of a flag that is accepted with some values (separated by spaces) and refused with others."""
    agreed = tuple(values.split())

    def read(words: tuple[str, ...], line: Line) -> Reading:
        return Reading() if set(words) <= set(agreed) else Reading(refused=otherwise)

    # a reason that repeats the text is left out
    reason = "" if otherwise.removesuffix(" here") == text else f": {otherwise}"
    return Entry(flag, "same", f"{text}; other values are refused{reason}", takes, read, agreed)


def same_if(
    flag: str, text: str, disagrees: Callable[[tuple[str, ...], Line], str], *, takes: Takes = "nothing"
) -> Entry:
    """Make the row of a flag that is accepted unless ``disagrees`` returns a reason."""
    return Entry(flag, "same", text, takes, lambda words, line: Reading(refused=disagrees(words, line)))


def means(flag: str, text: str, ours: str, *, takes: Takes = "nothing") -> Entry:
    """Make the row of a flag that is ``ours`` here: our flags and their values, ``{}`` for the words behind it."""

    def read(words: tuple[str, ...], line: Line) -> Reading:
        return Reading(flags_of([word for part in ours.split() for word in (words if part == "{}" else (part,))]))

    return Entry(flag, "means", f"{text}: {ours.replace('{}', 'VALUE')}", takes, read)


def becomes(flag: str, text: str, read: Reader, *, takes: Takes = "one") -> Entry:
    """Make the row of a flag whose meaning here depends on its value or on the rest of the line."""
    return Entry(flag, "means", text, takes, read)


def refused(flag: str, text: str, *, takes: Takes = "nothing") -> Entry:
    """Make the row of a flag that would change the trained model and that this trainer does not have."""
    return Entry(flag, "refused", text, takes, lambda words, line: Reading(refused=text))


def flags_of(words: Sequence[str]) -> list[Given]:
    """Return our flags with their values from the words of a line."""
    flags: list[Given] = []
    for word in words:
        if word.startswith("--"):
            flags.append(Given(word))
        else:
            flags[-1] = Given(flags[-1].name, (*flags[-1].values, word))
    return flags


def words(text: str) -> list[str]:
    """Return the words of a text, for rows that differ only in the flag."""
    return text.split()
