"""Draw the house in words: rooms, arrows and floors of megakd/ and of megakd/pipeline/.

    python docs/draw_house.py [CHECKOUT]     # another checkout's house, by the layers of its tests/test_house.py
    python docs/draw_house.py --write        # put it into docs/architecture.md

A room is a file or a folder directly inside the folder that is drawn. An arrow is an import of one room by another,
at the top of a file or inside a function; imports for annotations alone do not count, nor does the table of verbs in
__main__.py, which names modules as text. The floor of a room is the longest way from it down to a room that
imports nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw_house.py -->\n```\n", "```\n<!-- end of the drawing -->"


@dataclass(frozen=True)
class House:
    """arrows: by room, those that it imports."""

    folder: str
    arrows: dict[str, set[str]]

    def floors(self) -> tuple[list[list[str]], list[str]]:
        """Rooms by floor, the ground floor first, and the circles; the last arrow of a circle is left out."""
        floor: dict[str, int] = {}
        circles: list[str] = []

        def height(room: str, trail: tuple[str, ...]) -> int:
            if room in trail:
                circles.append(" -> ".join((*trail[trail.index(room) :], room)))
                return -1
            if room not in floor:
                below = [height(name, (*trail, room)) for name in sorted(self.arrows[room])]
                floor[room] = 1 + max(below, default=-1)
            return floor[room]

        for room in self.arrows:
            height(room, ())
        levels = range(max(floor.values()) + 1)
        return [sorted(room for room in floor if floor[room] == level) for level in levels], circles


def draw(checkout: Path) -> str:
    """The drawing of a checkout."""
    rules = rules_of(checkout)
    lines: list[str] = []
    for folder in ("megakd", "megakd/pipeline"):
        house = look_at(checkout, folder)
        lines += [*describe(house, rules), ""]
    return "\n".join(lines[:-1]) + "\n"


def look_at(checkout: Path, folder: str) -> House:
    """Read the imports of every file below a folder."""
    inside = checkout / folder
    rooms = {path.stem for path in inside.glob("*.py") if path.stem != "__init__"}
    rooms |= {path.name for path in inside.iterdir() if any(path.glob("**/*.py"))}
    arrows: dict[str, set[str]] = {room: set() for room in sorted(rooms)}
    package = folder.replace("/", ".")
    for path in inside.rglob("*.py"):
        room = path.relative_to(inside).parts[0].removesuffix(".py")
        for module in imports_of(ast.parse(path.read_text())):
            if room in arrows and module.startswith(package + "."):
                below = module[len(package) + 1 :].split(".")[0]
                if below in rooms - {room}:
                    arrows[room].add(below)
    return House(folder, arrows)


def imports_of(node: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports, of names in a module too: ``a.b`` for ``from a import b``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ("TYPE_CHECKING" in (test := ast.unparse(child.test)) or "__main__" in test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports_of(child)


def rules_of(checkout: Path) -> dict[str, Any]:
    """The tables of tests/test_house.py that arrows are held against; a checkout may lack some."""
    tables: dict[str, Any] = {}
    for node in ast.parse((checkout / "tests" / "test_house.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(NameError, TypeError):  # tables are literals, or made of those before them
                value = eval(compile(ast.Expression(node.value), "test_house.py", "eval"), {}, tables)
                tables[node.targets[0].id] = value
    return tables


def against_the_rules(house: House, rules: dict[str, Any]) -> list[str] | None:
    """Arrows that the tables of tests/test_house.py do not allow; None where no table speaks of this folder."""
    if house.folder == "megakd":
        row = {entry: number for number, entries in enumerate(rules["LAYERS"]) for entry in entries}
        allowed = rules.get("NEIGHBOURS", set())
        free = rules.get("FOUNDATION_MAY_IMPORT_ITSELF")  # a row, in older checkouts
        pairs = [(room, below) for room, belows in house.arrows.items() for below in sorted(belows)]
        return [
            f"{a} -> {b}"
            for a, b in pairs
            if row[b] >= row[a] and (a, b) not in allowed and not row[a] == row[b] == free
        ]
    if "PIPELINE_ARROWS" not in rules:
        return None
    pairs = [(room, below) for room, belows in house.arrows.items() for below in sorted(belows)]
    return [f"{a} -> {b}" for a, b in pairs if (a, b) not in rules["PIPELINE_ARROWS"]]


def describe(house: House, rules: dict[str, Any]) -> list[str]:
    """One house: its counts, then a line for every room, the top floor first."""
    floors, circles = house.floors()
    circle = f"circles: {'; '.join(circles)}" if circles else "no circle"
    wrong = against_the_rules(house, rules)
    if wrong is None:
        held = "no rule for its arrows"
    else:
        held = f"against the rules: {', '.join(wrong)}" if wrong else "no arrow against the rules"
    count = sum(map(len, house.arrows.values()))
    lines = [f"{house.folder}/: {len(house.arrows)} rooms, {count} arrows, {len(floors)} floors; {circle}; {held}"]
    for level in reversed(range(len(floors))):
        for room in floors[level]:
            below = ", ".join(sorted(house.arrows[room]))
            lines.append(f"  {level}  {room}" + (f" -> {below}" if below else ""))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=HERE.parent)
    parser.add_argument("--write", action="store_true", help="put the drawing into docs/architecture.md")
    arguments = parser.parse_args()
    drawing = draw(arguments.checkout)
    print(drawing, end="")
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + drawing + rest[rest.index(END) :])


if __name__ == "__main__":
    main()
