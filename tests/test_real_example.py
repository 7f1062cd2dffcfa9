"""The example with a real teacher: what it makes of a page, and which documents lie on one side of the split."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

PAGE = """<html><head><title>not text</title></head><body><div id="banner">not text</div>
<ul class="docnav top"><li>not text</li></ul><div class="section"><h2>A <code>title</code></h2>
<p>One
paragraph, <em>one</em> line.<br/>Another line.</p><pre class="screen">$ ls
  a  b
</pre><a class="indexterm" id="x"></a><ul><li>first</li><li>second &amp; last</li></ul></div></body></html>"""


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of the example importable, as its scripts do."""
    for folder in ("demo", "real"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))


@pytest.mark.usefixtures("examples")
def test_a_page_is_its_paragraphs_and_listings() -> None:
    import handbook

    assert handbook.blocks_of(PAGE) == [
        "A title", "One paragraph, one line.", "Another line.", "$ ls\n  a  b", "first", "second & last"
    ]  # fmt: skip


@pytest.mark.usefixtures("examples")
def test_a_page_lies_on_one_side_and_a_paragraph_comes_once(tmp_path: Path) -> None:
    import handbook
    import parts

    html = tmp_path / "debian-handbook" / "usr/share/doc/debian-handbook/html"
    same = "This paragraph is not translated yet. " * 20
    for language in handbook.LANGUAGES:
        (html / language).mkdir(parents=True)
        for page in range(40):
            words = f"{language} {page} " * 100
            (html / language / f"{page}.html").write_text(f"<p>{words}</p><p>{same}</p>")
    pages = list(handbook.pages(tmp_path))
    assert len(pages) == 40 * len(handbook.LANGUAGES)
    assert sum(text.count("not translated yet") > 0 for _, _, text in pages) == 1
    sides = {name: parts.part_of(name) for _, name, _ in pages}
    assert len({*sides.values()} - {None}) == 3
    documents = [(kind, name) for kind, name, _ in parts.documents(tmp_path)]
    assert len(documents) == len(set(documents))
    assert "python" in {kind for kind, _ in documents}
    sys.modules.pop("parts")
