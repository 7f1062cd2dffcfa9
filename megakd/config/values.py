"""Values of options: text of a flag or a YAML file, or plain data, read as the option's type."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(
    r"[+-]?(([0-9]+(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE
)
_LARGEST_INTEGER = 2**63 - 1
_WORDS = MappingProxyType(
    {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # spellings of a switch
)


@dataclass(frozen=True)
class Plain:
    """Text without quotes, which may stand for null; quoted text is a ``str``.

    nulls: the texts that stand for null. Those of a flag leave out the empty text, which comes from an empty shell
    variable and not from a wish for null.
    """

    text: str
    nulls: tuple[str, ...] = ("", "~", "null", "Null", "NULL")

    @property
    def is_null(self) -> bool:
        """True if the text stands for null."""
        return self.text in self.nulls


class WrongType(ValueError):
    """A value is not of its option's type. expected: that type, in words."""

    def __init__(self, value: Any, expected: str) -> None:
        super().__init__(f"{show(value)}; expected {expected}")


def read_value(value: Any, hint: Any) -> Any:
    """Return ``value`` as the type ``hint``: bool, int, float, str, a Literal, a list of those, or any of them or None.

    Text without quotes is read by the option's type alone: ``010`` is ten for an integer and three characters for a
    path, ``yes`` is true for a switch. A single value for a list is a list of one.

    Raises WrongType.
    """
    optional, inner = _split_optional(hint)
    if value is None or (isinstance(value, Plain) and value.is_null):
        if optional:
            return None
        raise WrongType(None, type_name(hint))
    if typing.get_origin(inner) is list:
        (item,) = typing.get_args(inner)
        return [read_value(element, item) for element in (value if isinstance(value, list | tuple) else [value])]
    if isinstance(value, list | tuple | dict):
        raise WrongType(value, type_name(hint))
    for candidate in typing.get_args(inner) if _is_union(inner) else (inner,):
        reader = _read_literal if typing.get_origin(candidate) is Literal else _READERS[candidate]
        result = reader(value, candidate)
        if result is not None:
            return result
    raise WrongType(value, type_name(hint))


def show(value: Any) -> str:
    """Return a value as a message shows it, cut to 80 characters."""
    if isinstance(value, Plain):
        text = value.text or "null"
    elif isinstance(value, Mapping):
        text = "a group of keys"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(element) for element in value[:4]) + (", ..." if len(value) > 4 else "") + "]"
    else:
        text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def type_name(hint: Any) -> str:
    """Return a type in words, as 'expected ...' continues."""
    optional, inner = _split_optional(hint)
    if typing.get_origin(inner) is list:
        words = f"a list, each {type_name(typing.get_args(inner)[0])}"
    elif typing.get_origin(inner) is Literal:
        choices = [str(choice) for choice in typing.get_args(inner)]
        words = choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    elif _is_union(inner):
        words = " or ".join(type_name(member) for member in typing.get_args(inner))
    else:
        words = _NAMES[inner]
    return f"{words} or null" if optional else words


def takes_switch(hint: Any) -> bool:
    """Return True if the flag needs no value: the type is bool, or bool or None."""
    return _split_optional(hint)[1] is bool


def takes_list(hint: Any) -> bool:
    """Return True if the type is a list, or a list or None."""
    return typing.get_origin(_split_optional(hint)[1]) is list


def metavar(hint: Any) -> str:
    """Return the placeholder of the flag's value in ``--help``."""
    _, inner = _split_optional(hint)
    if typing.get_origin(inner) is Literal:
        return "{" + ",".join(str(value) for value in typing.get_args(inner)) + "}"
    if _is_union(inner):
        return "|".join(metavar(member) for member in typing.get_args(inner))
    if typing.get_origin(inner) is list:
        return metavar(typing.get_args(inner)[0]) + " ..."
    return str(getattr(inner, "__name__", inner)).upper()


def _split_optional(hint: Any) -> tuple[bool, Any]:
    """Return True if None is allowed, and the type without None."""
    if not _is_union(hint):
        return False, hint
    kept = tuple(member for member in typing.get_args(hint) if member is not type(None))
    if len(kept) == len(typing.get_args(hint)):
        return False, hint
    return True, kept[0] if len(kept) == 1 else typing.Union[kept]  # noqa: UP007


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _text(value: Any) -> str | None:
    return value.text if isinstance(value, Plain) else value if isinstance(value, str) else None


def _read_bool(value: Any, _: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _WORDS.get((_text(value) or "").lower())


def _read_int(value: Any, _: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= _LARGEST_INTEGER else None
    text = _text(value)
    if text is None or not _INTEGER.fullmatch(text) or len(text) > 30:
        return None
    return _read_int(int(text), _)


def _read_float(value: Any, _: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) <= 2**1023 or isinstance(value, float) else None
    text = _text(value)
    return None if text is None or not _NUMBER.fullmatch(text) else float(text)


def _read_str(value: Any, _: Any) -> str | None:
    text = _text(value)
    return None if text is None or "\0" in text else text  # no file, flag or name has a null byte


def _read_literal(value: Any, hint: Any) -> Any:
    for choice in typing.get_args(hint):
        if str(choice) == (str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)):
            return choice
    return None


_READERS: Mapping[type, Callable[[Any, Any], Any]] = MappingProxyType(
    {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
)
_NAMES: Mapping[type, str] = MappingProxyType(
    {
        bool: "true or false",
        int: f"a whole number, at most {_LARGEST_INTEGER}",
        float: "a number",
        str: "text",
    }
)
