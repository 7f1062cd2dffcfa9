"""The example's text as datasets of the teacher's tokenizer: a book in six languages, and Python's standard library."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))  # the sources of the standard library

import corpus
import handbook
from stages import Word, megakd, stage

HELD_OUT, REFERENCE, STUDENTS = "held-out", "for-reference", "for-students"
# Documents are dealt into 64 equal piles: 3 held out, 8 for the reference, 30 for the students, the others unused,
# because the teacher's pass over the students' part is what takes longest.
_DEALT, _PILES = 64, {HELD_OUT: 3, REFERENCE: 8, STUDENTS: 30}
_CODE_SHARE = 4  # one source file in so many, so that code is about as much as a language


def prepare_text(text: Path, packages: Path, tokenizer: Path) -> None:
    """Write what is not there yet into the folder ``text``: JSON lines, and a dataset of each part."""
    text.mkdir(parents=True, exist_ok=True)
    last = text / f"{STUDENTS}.jsonl"
    stage(last.exists(), "text", lambda: print(write_parts(text, packages)))
    for part in (HELD_OUT, REFERENCE, STUDENTS):
        done = Path(f"{text / part}_text_document.manifest.json").exists()
        flags: list[Word] = ["--input", text / f"{part}.jsonl", "--output-prefix", text / part, "--append-eod"]
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        megakd(f"tokens of {part}", done, "preprocess", *flags)


def write_parts(text: Path, packages: Path) -> str:
    """Deal the documents out to the three parts; returns a line that says how much there is in each."""
    sizes = dict.fromkeys((HELD_OUT, REFERENCE, STUDENTS), 0)
    with ExitStack() as stack:
        files = {part: stack.enter_context(open(text / f"{part}.jsonl.part", "w")) for part in sizes}
        for kind, name, document in documents(packages):
            part = part_of(name)
            if part is None:
                continue
            files[part].write(json.dumps({"text": document, "kind": kind, "source": name}, ensure_ascii=False) + "\n")
            sizes[part] += len(document.encode())
    for part in sizes:
        os.replace(text / f"{part}.jsonl.part", text / f"{part}.jsonl")
    return "; ".join(f"{part}: {size / 1e6:.1f} MB" for part, size in sizes.items())


def documents(packages: Path) -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and text of all documents; those that must lie on one side of the split share a name."""
    yield from handbook.pages(packages)
    for document in corpus.documents():
        if _number(f"code/{document.name}") % _CODE_SHARE == 0:
            yield "python", document.name, document.text


def part_of(name: str) -> str | None:
    """The part that a document belongs to; None for one that is left out."""
    pile = _number(name) % _DEALT
    for part, piles in _PILES.items():
        if pile < piles:
            return part
        pile -= piles
    return None


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=b"real").digest(), "little")
