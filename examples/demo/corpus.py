"""Real text that every Python installation carries, as JSON lines, and a sentencepiece tokenizer trained on it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 4096
HELD_OUT_SHARE = 20  # one document in so many
# Some distributions leave the tests out; the others are machine-made tables, copies, or not part of the library.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """name: what the split is decided by, so that a file is never on both sides."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return _number(self.name, "") % HELD_OUT_SHARE == 0


def documents() -> Iterator[Document]:
    """The sources of the standard library and the topics of Python's help(), in a fixed order, each text once."""
    seen: set[str] = set()
    for name, text in _texts():
        if text not in seen:  # a copy could stand on the other side of the split
            seen.add(text)
            yield Document(name, text)


def write_corpus(train: Path, held_out: Path) -> str:
    """Write both splits as JSON lines; returns a line that says how much there is."""
    sizes = {train: [0, 0], held_out: [0, 0]}
    with open(f"{train}.part", "w") as train_file, open(f"{held_out}.part", "w") as held_out_file:
        for document in documents():
            path, file = (held_out, held_out_file) if document.held_out else (train, train_file)
            file.write(json.dumps({"text": document.text, "source": document.name}) + "\n")
            sizes[path][0] += 1
            sizes[path][1] += len(document.text.encode())
    for path in sizes:
        os.replace(f"{path}.part", path)
    return "; ".join(f"{path.stem}: {count} documents, {size / 1e6:.1f} MB" for path, (count, size) in sizes.items())


def write_parts(corpus: Path, *parts: Path, of: int) -> str:
    """Deal the documents of one file of JSON lines out to ``of`` files, of which the first are written; returns a line
    that says how much there is in each."""
    dealt: list[list[str]] = [[] for _ in range(of)]
    for line in corpus.open():
        dealt[_number(json.loads(line)["source"], "part") % of].append(line)
    for path, lines in zip(parts, dealt):
        Path(f"{path}.part").write_text("".join(lines))
        os.replace(f"{path}.part", path)
    return "; ".join(f"{path.stem}: {len(lines)} documents" for path, lines in zip(parts, dealt))


def train_tokenizer(corpus: Path, model: Path) -> None:
    """A byte-pair encoding with byte fallback that gives every text back unchanged; a newline is a piece."""
    texts = (json.loads(line)["text"] for line in corpus.open())
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=proto,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    Path(f"{model}.part").write_bytes(proto.getvalue())
    os.replace(f"{model}.part", model)


def _number(name: str, purpose: str) -> int:
    """Of a document, the same wherever and in whatever order it is met."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")


def _texts() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = path.read_text("utf-8").strip()
        except UnicodeDecodeError:
            continue  # a source in another encoding
        if len(text) > 100:
            yield "/".join(parts), text
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topics/{name}", text.strip()
