"""The pages of the project are current: what a script makes of the code is what stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
