"""Real text in several languages: the Debian Administrator's Handbook, from the Debian package of that name.

The package (GPL-2+ or CC-BY-SA-3.0, 35 MB) holds one book in 26 languages as HTML. A page is a document; it lies on the
same side of the split in every language, so that no translation of a held-out page is learnt from.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGE = "debian-handbook"
LANGUAGES = ("en-US", "de-DE", "fr-FR", "es-ES", "ru-RU", "ja-JP")
_SHORTEST = 400  # characters; shorter pages are lists of links
_BLOCKS = {"div", "p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "tr", "table", "pre", "br"}
_NO_TEXT = {"head", "script", "style"}
_NAVIGATION = {"docnav", "toc", "banner", "indexterm"}


def pages(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield language, page and text of every page, in a fixed order; the package is fetched where it is missing.

    A paragraph is given once: the translations carry what is not translated yet in English.
    """
    html = fetch(folder) / "usr/share/doc/debian-handbook/html"
    seen: set[str] = set()
    for language in LANGUAGES:
        for path in sorted((html / language).glob("*.html")):
            blocks = [block for block in dict.fromkeys(blocks_of(path.read_text("utf-8"))) if block not in seen]
            seen.update(blocks)
            text = "\n\n".join(blocks)
            if len(text) >= _SHORTEST:
                yield language, path.name, text


def fetch(folder: Path) -> Path:
    """Download and unpack the package into ``folder``, unless it is there."""
    unpacked = folder / PACKAGE
    if unpacked.exists():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        sys.exit(
            f"error: the text is the Debian package {PACKAGE}, which takes apt-get and dpkg-deb; elsewhere, unpack its "
            f".deb from packages.debian.org into {unpacked}"
        )
    if subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder).returncode:
        sys.exit(f"error: apt-get has no {PACKAGE}, or its archive cannot be reached")
    (archive,) = folder.glob(f"{PACKAGE}_*.deb")
    unfinished = folder / f"{PACKAGE}.part"
    subprocess.run(["dpkg-deb", "--extract", archive.name, unfinished.name], cwd=folder, check=True)
    unfinished.rename(unpacked)
    return unpacked


def blocks_of(html: str) -> list[str]:
    """The paragraphs and headings of a page, each one line, and its listings, with their own line ends."""
    reader = _Reader()
    reader.feed(html)
    return reader.blocks()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._open: list[tuple[str, bool]] = []  # elements, and whether the text inside is left out

    def blocks(self) -> list[str]:
        blocks = []
        for block in "".join(self._parts).split("\f"):
            kept = block.strip("\n") if block.startswith("\v") else re.sub(r"\s+", " ", block).strip()
            if kept.strip():
                blocks.append(kept.removeprefix("\v").rstrip())
        return blocks

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split()) | {dict(attrs).get("id")}
        hidden = tag in _NO_TEXT or bool(_NAVIGATION & classes) or any(hidden for _, hidden in self._open)
        if tag not in ("br", "img", "meta", "link", "hr"):
            self._open.append((tag, hidden))
        if tag in _BLOCKS:
            self._parts.append("\f\v" if tag == "pre" else "\f")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass
        if tag in _BLOCKS:
            self._parts.append("\f")

    def handle_data(self, data: str) -> None:
        if not any(hidden for _, hidden in self._open):
            self._parts.append(data)
