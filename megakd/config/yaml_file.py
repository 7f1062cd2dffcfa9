"""YAML file as a tree of groups, read strictly: no code, no surprise of YAML 1.1, no key given twice.

Scalars stay text: the type of their option decides their meaning (``megakd.config.values``). The parser's events are
put together here, one by one, so that neither depth nor references can cost more than the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megakd.config.values import Plain
from megakd.errors import UsageError

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 20


def read_config_file(path: str, flag: str = "--config") -> dict[str, Any]:
    """Read the tree of a file: mappings with text keys, lists, quoted text (``str``) and other scalars (``Plain``).

    flag: the flag that names the file, for messages.

    Raises UsageError, one line with file and line number, for a file that cannot be read, is not UTF-8 or is no mapping
    of keys, and for several documents, a key given twice, tags, references to an open group, more than ``MAX_VALUES``
    values with references followed, or more than ``MAX_DEPTH`` levels.
    """
    text = _read_text(path, flag)
    try:
        return _Builder(path).build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}{_line(error)}: not YAML: {_problem(error)}") from None


def _read_text(path: str, flag: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except ValueError as error:  # a name with a null byte
        raise UsageError(f"{flag} {path!r}: {error}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{flag} {path}: larger than {MAX_BYTES >> 20} MiB; expected a configuration file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: byte {error.start} is not UTF-8 text; save it as UTF-8") from None


class _Builder:
    """Builder of one document from the parser's events."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._anchors: dict[str, tuple[Any, int]] = {}  # value, and the number of values in it
        self._open: set[str] = set()
        self._num_values = 0

    def build(self, events: Iterator[Any]) -> dict[str, Any]:
        """Return the tree of the only document; an empty tree for an empty file."""
        tree: Any = {}
        num_documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise self._refuse(event, "a second document; expected one tree of groups and keys")
                tree = self._value(next(events), events, depth=0)
        if isinstance(tree, Plain) and tree.is_null:
            return {}
        if not isinstance(tree, dict):
            kind = "a list" if isinstance(tree, list) else "a single value"
            raise UsageError(
                f"{self._path}: the file is {kind}; expected groups and keys, such as 'optim: {{lr: 1e-4}}'"
            )
        return tree

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._reference(event)
        before, anchor = self._num_values, event.anchor
        self._count(event, 1)
        if event.tag is not None:
            raise self._refuse(event, f"the tag '{event.tag}' is not read; expected plain values without tags")
        if depth > MAX_DEPTH:
            raise self._refuse(event, f"more than {MAX_DEPTH} levels deep")
        if anchor is not None:
            self._open.add(anchor)
        if isinstance(event, yaml.MappingStartEvent):
            value: Any = self._mapping(events, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                value.append(self._value(item, events, depth + 1))
        else:
            value = Plain(event.value) if event.style is None else event.value
        if anchor is not None:
            self._open.discard(anchor)
            self._anchors[anchor] = (value, self._num_values - before)
        return value

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Any]:
        direct: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        event: Any
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refuse(event, "a list or a group as a key; expected a name")
            if event.tag is not None or event.anchor is not None:
                raise self._refuse(event, f"the key '{event.value}' has a tag or an anchor; expected a bare name")
            mark: Any = event.start_mark
            key, line = event.value, mark.line + 1
            if key in lines:
                raise self._refuse(event, f"'{key}' is given twice (first in line {lines[key]}); keep one")
            lines[key] = line
            value = self._value(next(events), events, depth + 1)
            if key != "<<" or event.style is not None:
                direct[key] = value
                continue
            for source in value if isinstance(value, list) else [value]:
                if not isinstance(source, dict):
                    raise self._refuse(event, "'<<' takes a group, or a list of groups")
                merged = {**source, **merged}  # the first of a list counts, as YAML says
        return {**merged, **direct}  # a group's own keys override merged ones, as YAML says

    def _reference(self, event: Any) -> Any:
        if event.anchor in self._open:
            raise self._refuse(event, f"'*{event.anchor}' refers to what it stands in")
        if event.anchor not in self._anchors:
            raise self._refuse(event, f"'*{event.anchor}' refers to nothing above it")
        value, size = self._anchors[event.anchor]
        self._count(event, size)
        return value

    def _count(self, event: Any, number: int) -> None:
        self._num_values += number
        if self._num_values > MAX_VALUES:
            raise self._refuse(event, f"more than {MAX_VALUES} values, references followed")

    def _refuse(self, event: Any, problem: str) -> UsageError:
        return UsageError(f"{self._path}: line {event.start_mark.line + 1}: {problem}")


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(problem).split())
