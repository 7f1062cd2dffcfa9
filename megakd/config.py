"""Configuration: a tree of dataclasses filled from defaults, then a YAML file, then flags.

A leaf is declared beside the code that reads it, ``lr: float = option(3e-4, "peak learning rate")``. Every leaf has two
names: its place in the YAML tree (``optim: {lr: ...}``) and one flat flag with Megatron's spelling (``--lr``). Unknown
keys are errors. The resolved tree is what ``--print-config`` prints and what every command writes beside its result.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megakd.errors import UsageError

Root = TypeVar("Root")


def option(default: Any, help: str, *, common: bool = False, positional: bool = False, flag: str | None = None) -> Any:
    """Declare a leaf: its default (``...`` if it must be given) and its meaning in one line.

    common: shown by ``--help`` (the others only by ``--help-all``).
    flag: the flat flag where it is not the field's name; one with its dashes takes no prefix of its group.
    """
    metadata = {"help": help, "common": common, "positional": positional, "flag": flag, "required": default is ...}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=None if default is ... else default, metadata=metadata)


def group(cls: type[Root], title: str, *, flag_prefix: str = "") -> Root:
    """Declare a group of leaves, a dataclass of its own. flag_prefix keeps two groups of one class apart."""
    field: Root = dataclasses.field(
        default_factory=cls, metadata={"title": title, "flag_prefix": flag_prefix, "group": cls}
    )
    return field


@dataclasses.dataclass(frozen=True)
class _Leaf:
    key: str  # place in the tree, dotted
    flag: str
    field: dataclasses.Field[Any]
    hint: Any
    title: str


def parse(
    root: type[Root], argv: Sequence[str] | None, *, prog: str, description: str, epilog: Sequence[str] = ()
) -> Root:
    """Fill ``root`` from ``--config FILE`` and flags, validate it and return it.

    Every dataclass of the tree may have a ``validate()`` method that raises ``UsageError``. ``--help``, ``--help-all``
    and ``--print-config`` print and exit with status 0. epilog: lines that the help ends with.

    Raises:
        UsageError: unknown key or flag, a value of another type, a required one missing, or what ``validate`` refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_all = "--help-all" in arguments
    leaves = list(_leaves(root, "", "", "options"))
    if show_all or "--help" in arguments or "-h" in arguments:
        print("\n".join([*_help(leaves, prog, description, show_all), *epilog]))
        raise SystemExit(0)
    parser = _build_parser(leaves, prog)
    print_config = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    try:
        values = parser.parse_args(_bare_switches(arguments, leaves))
    except ArgumentError as error:
        raise UsageError(_explain(str(error), leaves, prog)) from None
    except (TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{prog}: the configuration file is not a tree of groups and keys: {error}") from None
    missing = [leaf for leaf in leaves if leaf.field.metadata["required"] and values[leaf.key] in (None, [])]
    if missing and not print_config:
        names = ", ".join(leaf.field.name if leaf.field.metadata["positional"] else leaf.flag for leaf in missing)
        raise UsageError(f"{prog}: missing: {names} (see {prog} --help)")
    config: Root = _build(root, values)
    if print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    validate(config)
    return config


def validate(config: Any) -> None:
    """Refuse numbers that are not finite, and run ``validate()`` of every dataclass in the tree, leaves first."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{field.name.replace('_', '-')} is {value}; expected a finite number")
        if dataclasses.is_dataclass(value):
            validate(value)
    if hasattr(config, "validate"):
        config.validate()


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain data, in declaration order."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    return tree


def dump(config: Any) -> str:
    """The tree as YAML that ``--config`` reads back."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, width=120)
    return text


def from_dict(root: type[Root], tree: dict[str, Any]) -> Root:
    """The inverse of ``to_dict``; unknown keys are a ``UsageError``, missing ones take their defaults."""
    leaves = list(_leaves(root, "", "", "options"))
    parser = _build_parser(leaves, root.__name__)
    try:
        values = parser.parse_object(tree)
    except ArgumentError as error:
        raise UsageError(_explain(str(error), leaves, root.__name__)) from None
    built: Root = _build(root, values)
    return built


def _leaves(cls: Any, key_prefix: str, flag_prefix: str, title: str) -> Iterator[_Leaf]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            meta, key = field.metadata, f"{key_prefix}{field.name}."
            yield from _leaves(meta["group"], key, flag_prefix + meta["flag_prefix"], meta["title"])
        else:
            flag = field.metadata["flag"] or field.name.replace("_", "-")
            flag = flag if flag.startswith("--") else f"--{flag_prefix}{flag}"
            yield _Leaf(key_prefix + field.name, flag, field, hints[field.name], title)


def _build_parser(leaves: list[_Leaf], prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    for leaf in leaves:
        if leaf.field.metadata["positional"]:
            # jsonargparse gives a positional no default; optional here, so that a missing one is reported as any other.
            kwargs = _type_arguments(leaf.hint)
            parser.add_argument(leaf.key, **{**kwargs, "nargs": "*" if "nargs" in kwargs else "?"})
        else:
            names = list(dict.fromkeys([f"--{leaf.key}", leaf.flag]))
            parser.add_argument(*names, default=_default(leaf), **_type_arguments(leaf.hint))
    return parser


def _bare_switches(arguments: list[str], leaves: list[_Leaf]) -> list[str]:
    """``--flag`` of a bool takes the next word only if that is true or false, not a positional that follows."""
    switches = {name for leaf in leaves if leaf.hint is bool for name in (leaf.flag, f"--{leaf.key}")}
    following = [*arguments[1:], ""]
    return [
        f"{word}=true" if word in switches and after.lower() not in ("true", "false") else word
        for word, after in zip(arguments, following)
    ]


def _default(leaf: _Leaf) -> Any:
    factory = leaf.field.default_factory
    return leaf.field.default if factory is dataclasses.MISSING else factory()


def _help(leaves: list[_Leaf], prog: str, description: str, show_all: bool) -> list[str]:
    lines = [f"usage: {prog} [--config FILE.yaml] [flags]", "", *textwrap.wrap(description, 100)]
    entries = [
        ("general", "--config FILE", "YAML file; later ones and flags override what it says"),
        ("general", "--print-config", "print the resolved configuration as YAML and exit"),
        ("general", "--help, --help-all", "the common flags; every flag"),
    ]
    hidden = 0
    for leaf in leaves:
        meta, default = leaf.field.metadata, _default(leaf)
        if not (show_all or meta["common"] or meta["required"]):
            hidden += 1
            continue
        text: str = meta["help"]
        if meta["required"]:
            text += " (required)"
        elif default not in (None, [], False) and "(default" not in text:
            text += f" (default: {default})"
        name = leaf.field.name.upper() if meta["positional"] else leaf.flag
        value = "" if leaf.hint is bool or meta["positional"] else " " + _metavar(leaf.hint)
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


def _type_arguments(hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"type": bool, "nargs": "?", "const": True}
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)] if _is_union(hint) else [hint]
    if len(inner) == 1 and typing.get_origin(inner[0]) is list:
        return {"type": typing.get_args(inner[0])[0], "nargs": "+"}
    return {"type": hint}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(str(value) for value in typing.get_args(hint)) + "}"
    if _is_union(hint):
        return "|".join(_metavar(arg) for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        return _metavar(typing.get_args(hint)[0]) + " ..."
    return str(getattr(hint, "__name__", hint)).upper()


def _build(cls: Any, values: Namespace) -> Any:
    kwargs = {}
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if "group" in field.metadata:
            if not isinstance(value, Namespace):
                raise UsageError(f"configuration group '{field.name}' is {value!r}; expected keys and values below it")
            value = _build(field.metadata["group"], value)
        kwargs[field.name] = value
    return cls(**kwargs)


def _explain(message: str, leaves: list[_Leaf], prog: str) -> str:
    """One line from jsonargparse's message, with the nearest known name where a name is unknown."""
    line = " ".join(message.split())
    unknown = re.search(r"Option '([^']+)' is not accepted|[Uu]nrecognized arguments: (\S+)", line)
    if unknown:
        name = (unknown.group(1) or unknown.group(2)).split("=")[0]
        known = [leaf.flag if name.startswith("--") else leaf.key for leaf in leaves]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        line = f"unknown {'flag' if name.startswith('--') else 'configuration key'} '{name}'"
        line += f"; did you mean '{near[0]}'?" if near else ""
    return f"{prog}: {line} (see {prog} --help-all)"
