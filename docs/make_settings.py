"""Write docs/settings.md, every flag of every verb, from the declarations in the code.

    python docs/make_settings.py

`tests/test_docs.py` fails when the page is not what this script makes.
"""

from __future__ import annotations

import ast
import importlib
import itertools
from pathlib import Path
from typing import Any

from megakd.__main__ import VERBS
from megakd.config.tree import Leaf, list_leaves
from megakd.config.values import metavar, takes_switch

PAGE = Path(__file__).resolve().parent / "settings.md"
HEAD = """# Settings: every flag of every verb

*Made from the code by `python docs/make_settings.py`; do not edit.*

A verb reads its defaults, then the files of `--config FILE.yaml` in their order, then its flags: what comes later
counts. Every setting has a place in YAML and a flag. `optim.lr` is the key `lr` below `optim:` in a file, and `--lr`
on the command line (`--optim.lr` works too). A flag that is a switch needs no value (`--bf16`) and takes one (`--bf16
false`); `null` takes a value back; `...` stands for one value or more. A setting that does not exist, or has another
type, is refused with the nearest name, all of them at once.

Every verb also has `--help` (the flags in bold), `--help-all` (every flag) and `--print-config`, which prints the
resolved tree as YAML and does nothing else. `megakd train --help-megatron` lists the flags of Megatron-LM, and what
each comes to here.
"""


def configuration_of(module: str) -> Any:
    """The dataclass that a verb fills: the first argument of the call to ``parse`` in its module."""
    verb = importlib.import_module(module)
    assert verb.__file__ is not None
    for node in ast.walk(ast.parse(Path(verb.__file__).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse":
            return getattr(verb, ast.unparse(node.args[0]))
    raise AssertionError(f"{module} does not call parse()")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def default_of(leaf: Leaf) -> str:
    """The default as it is written in YAML; empty where there is none."""
    default = leaf.default
    if leaf.field.metadata["required"]:
        return "required"
    if default is None or default == []:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def row(leaf: Leaf) -> str:
    meta = leaf.field.metadata
    name = leaf.field.name.upper() if meta["positional"] else leaf.flag
    flag = f"**`{name}`**" if meta["common"] or meta["required"] else f"`{name}`"
    kind = "switch" if takes_switch(leaf.hint) else metavar(leaf.hint)
    if kind.startswith("{"):
        kind = " ".join(f"`{choice}`" for choice in kind.strip("{}").split(","))
    return f"| {flag} | `{leaf.key}` | {cell(kind)} | {cell(default_of(leaf))} | {cell(meta['help'])} |"


def make_page() -> str:
    """The whole page."""
    lines = [HEAD]
    lines += [f"- [`megakd {verb}`](#megakd-{verb}): {importlib.import_module(VERBS[verb]).HELP}" for verb in VERBS]
    for verb, module in VERBS.items():
        lines += ["", f"## megakd {verb}"]
        leaves = list_leaves(configuration_of(module))
        for title, group in itertools.groupby(leaves, key=lambda leaf: leaf.title):
            if title != "options":
                lines += ["", f"### {verb}: {title}"]
            lines += ["", "| flag | in YAML | type | default | meaning |", "|---|---|---|---|---|"]
            lines += [row(leaf) for leaf in group]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
    print(f"wrote {PAGE}")
