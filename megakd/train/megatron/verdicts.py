"""The four answers to a flag of Megatron-LM that is not ours: the same here, spelled otherwise, read as, refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megakd.config.command_line import Given, Line, Takes

Reader = Callable[[tuple[str, ...], Line], "Reading"]
"""From the words behind a flag, and the whole line, to what the flag comes to."""


@dataclass(frozen=True)
class Reading:
    """What one use of a flag comes to: our own flags, or a reason why it cannot be had. note: what to tell."""

    flags: Sequence[Given] = ()
    refused: str = ""
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of the table. text: the reason, or the meaning. read: what a use comes to."""

    flag: str
    verdict: Literal["same", "means", "refused"]
    text: str
    takes: Takes
    read: Reader
    values: tuple[str, ...] = ()


def same(flag: str, text: str, *, takes: Takes = "nothing", told: bool = False) -> Entry:
    """A flag that says what is so here anyway, or that changes nothing of the result. told: said in a run's notes."""
    return Entry(flag, "same", text, takes, lambda values, line: Reading(note=text if told else ""))


def same_for(flag: str, values: str, text: str, otherwise: str, *, takes: Takes = "one") -> Entry:
    """A flag that some values (separated by spaces) agree with, and no other."""
    agreed = tuple(values.split())

    def read(words: tuple[str, ...], line: Line) -> Reading:
        return Reading() if set(words) <= set(agreed) else Reading(refused=otherwise)

    return Entry(flag, "same", f"{text}; any other: {otherwise}", takes, read, agreed)


def same_if(
    flag: str, text: str, disagrees: Callable[[tuple[str, ...], Line], str], *, takes: Takes = "nothing"
) -> Entry:
    """A flag that agrees unless ``disagrees`` says why not."""
    return Entry(flag, "same", text, takes, lambda words, line: Reading(refused=disagrees(words, line)))


def means(flag: str, text: str, own: str, *, takes: Takes = "nothing") -> Entry:
    """A flag that is ``own`` here: our flags and their values, ``{}`` for the words behind it."""

    def read(words: tuple[str, ...], line: Line) -> Reading:
        return Reading(flags_of([word for part in own.split() for word in (words if part == "{}" else (part,))]))

    return Entry(flag, "means", f"{text}: {own.replace('{}', 'the same')}", takes, read)


def becomes(flag: str, text: str, read: Reader, *, takes: Takes = "one") -> Entry:
    """A flag whose meaning here depends on its value or on the rest of the line."""
    return Entry(flag, "means", text, takes, read)


def refused(flag: str, text: str, *, takes: Takes = "nothing") -> Entry:
    """A flag that would change what is trained, and that this trainer does not have."""
    return Entry(flag, "refused", text, takes, lambda words, line: Reading(refused=text))


def flags_of(words: Sequence[str]) -> list[Given]:
    """Our own flags from their words."""
    found: list[Given] = []
    for word in words:
        if word.startswith("--"):
            found.append(Given(word))
        else:
            found[-1] = Given(found[-1].name, (*found[-1].values, word))
    return found


def words(text: str) -> list[str]:
    """The words of a text, for rows that differ in the flag alone."""
    return text.split()
