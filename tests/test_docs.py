"""The pages of the project are current: paths exist, links lead somewhere, pages made by scripts are up to date."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "megakd", "requirements", "tests", "tools")
ROOMS = tuple(sorted(path.parent.relative_to(ROOT / "megakd").as_posix() for path in ROOT.glob("megakd/*/__init__.py")))


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def test_settings_are_those_of_the_code() -> None:
    make_settings = script("make_settings")
    page = make_settings.PAGE.read_text()
    assert page == make_settings.make_page(), "docs/settings.md is out of date: python docs/make_settings.py"


def test_every_verb_has_its_settings() -> None:
    from megakd.__main__ import VERBS

    make_settings = script("make_settings")
    assert re.findall(r"^## megakd (\S+)$", make_settings.make_page(), re.M) == list(VERBS)


def test_the_house_is_drawn_as_it_stands() -> None:
    draw_house = script("draw_house")
    shown = draw_house.PAGE.read_text().split(draw_house.BEGIN)[1].split(draw_house.END)[0]
    message = "docs/architecture.md shows another house: python docs/draw_house.py --write"
    assert shown == draw_house.draw(ROOT), message


def test_a_circle_and_a_wrong_arrow_are_drawn() -> None:
    draw_house = script("draw_house")
    house = draw_house.House("megakd", {"data": {"losses"}, "losses": {"data"}})
    floors, circles = house.floors()
    assert circles == ["data -> losses -> data"] and sum(map(len, floors)) == 2
    lines = draw_house.describe(house, {"LAYERS": (("data",), ("losses",))})
    assert lines[0].endswith("against the rules: data -> losses")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def paths_in(text: str) -> list[str]:
    """Words in backticks that begin as paths of this project do: with a folder of its root, or a room of megakd/."""
    words = re.findall(r"`([\w./-]+)(?::\d+)?`", text)
    begin = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/|(?:{'|'.join(ROOMS)})/[\w/]+\.py$)")
    return [word for word in words if begin.match(word)]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    paths = paths_in(page.read_text())
    lost = [path for path in paths if not ((ROOT / path).exists() or (ROOT / "megakd" / path).exists())]
    assert not lost, f"{name_of(page)} names {lost}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert not lost, f"{name_of(page)} links to {lost}"


def test_a_lost_path_is_seen() -> None:
    text = "`megakd/nowhere.py`, `losses/nowhere.py`, `runs/teacher` and `tests/train/`"
    assert paths_in(text) == ["megakd/nowhere.py", "losses/nowhere.py", "tests/train/"]
    assert "done-and-not-done" in anchors_of(ROOT / "docs" / "promises.md")
