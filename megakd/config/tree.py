"""Configuration: a tree of dataclasses filled from defaults, then YAML files, then flags.

A leaf is declared beside the code that reads it, ``lr: float = option(3e-4, "peak learning rate")``. Every leaf has two
names: its place in the YAML tree (``optim: {lr: ...}``) and one flat flag with Megatron's spelling (``--lr``). Unknown
keys are errors. ``--print-config`` prints the resolved tree, and every command writes it beside its result.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from megakd.config.command_line import Dialect, Line, Takes, split_words
from megakd.config.suggestions import did_you_mean
from megakd.config.values import Plain, WrongType, metavar, read_value, show, takes_list, takes_switch
from megakd.config.yaml_file import read_config_file
from megakd.errors import UsageError

Root = TypeVar("Root")


def option(default: Any, help: str, *, common: bool = False, positional: bool = False, flag: str | None = None) -> Any:
    """Declare a leaf: its default (``...`` if it must be given) and its meaning in one line.

    common: shown by ``--help`` (other leaves only by ``--help-all``).
    flag: the flat flag, if it is not the field's name; a flag with its dashes gets no prefix of its group.
    """
    metadata = {"help": help, "common": common, "positional": positional, "flag": flag, "required": default is ...}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is ... else default, metadata=metadata)


def group(cls: type[Root], title: str, *, flag_prefix: str = "") -> Root:
    """Declare a group of leaves, which is a dataclass. flag_prefix: keeps two groups of one class apart."""
    field: Root = dataclasses.field(
        default_factory=cls, metadata={"title": title, "flag_prefix": flag_prefix, "group": cls}
    )
    return field


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the tree. key: its place, dotted. hint: its type. title: of its group."""

    key: str
    flag: str
    field: dataclasses.Field[Any]
    hint: Any
    title: str

    @property
    def default(self) -> Any:
        """Default value; a new one each time for a list."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()


def parse(
    root: type[Root],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    epilog: Sequence[str] = (),
    dialect: Dialect | None = None,
) -> Root:
    """Fill ``root`` from ``--config FILE`` and flags, validate it and return it.

    Every dataclass of the tree may have a ``validate()`` method that raises ``UsageError``. The root may have
    ``check_given(given)``, which gets the places of the options that flags and files set, and ``resolved()``, which
    returns the tree with derived values filled in. ``--help``, ``--help-all`` and ``--print-config`` print and exit
    with status 0. epilog: last lines of the help. dialect: flags of another program that are understood too.

    Raises:
        UsageError: ``validate`` refuses a value; or, all in one message, keys and flags are unknown, values have
            another type, or required values are missing.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_all = "--help-all" in arguments
    leaves = list_leaves(root)
    if show_all or "--help" in arguments or "-h" in arguments:
        print("\n".join([*_help(leaves, prog, description, show_all), *epilog]))
        raise SystemExit(0)
    print_config = "--print-config" in arguments
    reading = _Reading(leaves, prog)
    reading.read_command(arguments, dialect)
    missing = [leaf for leaf in leaves if leaf.field.metadata["required"] and not reading.values.get(leaf.key)]
    if missing and not print_config and not reading.problems:
        names = ", ".join(leaf.field.name if leaf.field.metadata["positional"] else leaf.flag for leaf in missing)
        raise UsageError(f"{prog}: missing: {names} (see {prog} --help)")
    reading.refuse_problems()
    config: Any = _build(root, reading.values, "")
    if not print_config:
        validate(config)
        if hasattr(config, "check_given"):
            config.check_given(reading.given())
    if hasattr(config, "resolved"):
        config = config.resolved()
    if print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    for note in reading.notes:
        print(f"{prog}: {note}", file=sys.stderr)
    return typing.cast(Root, config)


def validate(config: Any) -> None:
    """Refuse numbers that are not finite, and run ``validate()`` of every dataclass in the tree, leaves first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{field.name.replace('_', '-')} is {number}; expected a finite number")
        if dataclasses.is_dataclass(value):
            validate(value)
    if hasattr(config, "validate"):
        config.validate()


def to_dict(config: Any) -> dict[str, Any]:
    """Return the tree as plain data, in declaration order."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    return tree


def dump(config: Any) -> str:
    """Return the tree as YAML that ``--config`` reads back."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, width=120)
    return text


def from_dict(root: type[Root], tree: Mapping[str, Any]) -> Root:
    """Build a tree from plain data, as `to_dict` returns it. Missing keys have their defaults.

    Raises UsageError for unknown keys and wrong types.
    """
    reading = _Reading(list_leaves(root), root.__name__)
    reading.read_tree(tree, source="")
    reading.refuse_problems()
    built: Root = _build(root, reading.values, "")
    return built


def list_leaves(root: Any) -> list[Leaf]:
    """Return every leaf of a tree, in declaration order."""
    return list(_leaves(root, "", "", "options"))


def _leaves(cls: Any, key_prefix: str, flag_prefix: str, title: str) -> Iterator[Leaf]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            meta, key = field.metadata, f"{key_prefix}{field.name}."
            yield from _leaves(meta["group"], key, flag_prefix + meta["flag_prefix"], meta["title"])
        else:
            flag = field.metadata["flag"] or field.name.replace("_", "-")
            flag = flag if flag.startswith("--") else f"--{flag_prefix}{flag}"
            yield Leaf(key_prefix + field.name, flag, field, hints[field.name], title)


class _Reading:
    """Reading of a command line and its files: values by their place in the tree, and everything that is wrong."""

    def __init__(self, leaves: list[Leaf], prog: str) -> None:
        self._leaves, self._prog = leaves, prog
        self._by_key = {leaf.key: leaf for leaf in leaves}
        self._by_flag = {name: leaf for leaf in leaves for name in (leaf.flag, f"--{leaf.key}")}
        self._groups = {leaf.key.rsplit(".", 1)[0] for leaf in leaves if "." in leaf.key}
        self._in_files: set[str] = set()
        self._in_flags: set[str] = set()
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def read_command(self, arguments: Sequence[str], dialect: Dialect | None) -> None:
        """Read the files, in their order, then the flags."""
        takes = {name: _takes(leaf) for name, leaf in self._by_flag.items() if not leaf.field.metadata["positional"]}
        words = split_words(arguments, {**takes, "--config": "one", "--print-config": "nothing"}, dialect)
        self.problems += words.problems
        for flag in words.flags:
            if flag.name == "--config":
                self.read_tree(read_config_file(flag.values[0]), source=f"{flag.values[0]}: ")
        latest = {flag.name: flag for flag in words.flags if flag.name not in ("--config", "--print-config")}
        flags = [flag for flag in words.flags if latest.get(flag.name) is flag]  # the last of each counts
        if dialect is not None:
            translation = dialect.translate(Line(flags, dict(self.values)))
            foreign = [flag for flag in flags if flag.name not in self._by_flag or dialect.reads_itself(flag)]
            flags = [flag for flag in flags if flag not in foreign] + list(translation.flags)
            self.problems += translation.refused
            self.notes += translation.notes
        for flag in flags:
            leaf = self._by_flag[flag.name]
            values = [Plain(word, nulls=("null",)) for word in flag.values] or [Plain("true")]
            self._read(leaf, values if takes_list(leaf.hint) else values[0], named=flag.name)
            self._in_flags.add(leaf.key)
        self._read_positionals(words.positionals)
        known = [leaf.flag for leaf in self._leaves if not leaf.field.metadata["positional"]]
        self.problems += [f"unknown flag '{flag.name}'{did_you_mean(flag.name, known)}" for flag in words.unknown]

    def read_tree(self, tree: Mapping[str, Any], *, source: str, prefix: str = "") -> None:
        """Read the values of a tree of groups. source: beginning of messages about it."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in self._groups:
                if isinstance(value, Mapping):
                    self.read_tree(value, source=source, prefix=f"{key}.")
                elif not (value is None or (isinstance(value, Plain) and value.is_null)):
                    self.problems.append(
                        f"{source}configuration group '{key}' is {show(value)}; expected keys and values below it"
                    )
            elif key in self._by_key and "." not in str(name):
                self._read(self._by_key[key], value, named=f"{source}{key}")
                self._in_files.add(key)
            else:
                near = did_you_mean(key, [*self._by_key, *self._groups])
                self.problems.append(f"{source}unknown configuration key '{key}'{near}")

    def refuse_problems(self) -> None:
        """Raise UsageError with everything that is wrong, if anything is."""
        if len(self.problems) == 1:
            raise UsageError(f"{self._prog}: {self.problems[0]} (see {self._prog} --help-all)")
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise UsageError(f"{self._prog}: {len(self.problems)} errors (see {self._prog} --help-all):\n{lines}")

    def given(self) -> frozenset[str]:
        """Return the places of the options that somebody chose, by a flag or in a file.

        A file with most keys of a group was written by ``--print-config`` or by a run: a default in it was not chosen.
        """
        chosen = set(self._in_flags)
        for key in self._in_files:
            group_name = key.rpartition(".")[0]
            whole = {leaf.key for leaf in self._leaves if leaf.key.rpartition(".")[0] == group_name}
            if 2 * len(whole & self._in_files) <= len(whole) or self.values[key] != self._by_key[key].default:
                chosen.add(key)
        return frozenset(chosen)

    def _read(self, leaf: Leaf, value: Any, *, named: str) -> None:
        try:
            self.values[leaf.key] = read_value(value, leaf.hint)
        except WrongType as error:
            self.problems.append(f"{named} is {error}")

    def _read_positionals(self, words: list[str]) -> None:
        for leaf in self._leaves:
            if leaf.field.metadata["positional"] and words:
                taken = words if takes_list(leaf.hint) else words[:1]
                words = words[len(taken) :]
                plain = [Plain(word, nulls=()) for word in taken]
                self._read(leaf, plain if takes_list(leaf.hint) else plain[0], named=leaf.field.name)
        self.problems += [f"unexpected word '{word}'; expected a flag" for word in words]


def _takes(leaf: Leaf) -> Takes:
    return "switch" if takes_switch(leaf.hint) else "many" if takes_list(leaf.hint) else "one"


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    kwargs = {}
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if "group" in field.metadata:
            kwargs[field.name] = _build(field.metadata["group"], values, f"{key}.")
        elif key in values:
            kwargs[field.name] = values[key]
    return cls(**kwargs)


def _help(leaves: list[Leaf], prog: str, description: str, show_all: bool) -> list[str]:
    lines = [f"usage: {prog} [--config FILE.yaml] [flags]", "", *textwrap.wrap(description, 100)]
    entries = [
        ("general", "--config FILE", "YAML file of options; later files and flags override it"),
        ("general", "--print-config", "print the resolved configuration as YAML and exit"),
        ("general", "--help, --help-all", "help with the common flags; with every flag"),
    ]
    hidden = 0
    for leaf in leaves:
        meta, default = leaf.field.metadata, leaf.default
        if not (show_all or meta["common"] or meta["required"]):
            hidden += 1
            continue
        text: str = meta["help"]
        if meta["required"]:
            text += " (required)"
        elif default not in (None, [], False) and "(default" not in text:
            text += f" (default: {default})"
        name = leaf.field.name.upper() if meta["positional"] else leaf.flag
        value = "" if takes_switch(leaf.hint) or meta["positional"] else " " + metavar(leaf.hint)
        entries.append((leaf.title, name + value, text))
    title = ""
    for section, left, right in entries:
        if section != title:
            lines += ["", f"{section}:"]
            title = section
        first, *rest = textwrap.wrap(right, 72)
        lines += [f"  {left:<44}  {first}"] if len(left) <= 44 else [f"  {left}", " " * 48 + first]
        lines += [" " * 48 + line for line in rest]
    if hidden:
        lines += ["", f"{hidden} more flags: {prog} --help-all"]
    return lines
