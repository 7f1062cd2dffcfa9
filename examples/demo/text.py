"""The examples' text as datasets: corpus, tokenizer, and one indexed dataset for each split."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import corpus
from stages import Word, megakd, stage

TRAIN, HELD_OUT, TOKENIZER = "train.jsonl", "held-out.jsonl", "bpe.model"
FOR_TEACHER, FOR_STUDENTS = "for-teacher.jsonl", "for-students.jsonl"


def prepare_text(text: Path) -> None:
    """Write what is not there yet into the folder ``text``."""
    text.mkdir(parents=True, exist_ok=True)
    train, held_out, model = text / TRAIN, text / HELD_OUT, text / TOKENIZER
    stage(held_out.exists(), "corpus", lambda: print(corpus.write_corpus(train, held_out)))
    stage(model.exists(), "tokenizer", partial(corpus.train_tokenizer, train, model))
    for file in (train, held_out):
        tokenize(file, text / file.stem, model)


def prepare_parts(text: Path) -> None:
    """A third of the documents to train on for the teacher, another for the students: more than they get to read."""
    parts = text / FOR_TEACHER, text / FOR_STUDENTS
    stage(parts[1].exists(), "parts", lambda: print(corpus.write_parts(text / TRAIN, *parts, of=3)))
    for file in parts:
        tokenize(file, text / file.stem, text / TOKENIZER)


def tokenize(file: Path, prefix: Path, model: Path) -> None:
    """The stage that makes a dataset ``PREFIX_text_document`` of a file of JSON lines."""
    done = Path(f"{prefix}_text_document.manifest.json").exists()
    tokenizer: list[Word] = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    flags: list[Word] = ["--input", file, "--output-prefix", prefix, "--append-eod", *tokenizer]
    megakd(f"tokens of {prefix.name}", done, "preprocess", *flags)
