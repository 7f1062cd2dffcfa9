"""Files of ready requests: read, refused, and their figures against a slow twin; text cut as the harness cuts it."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece

from megakd.data.tokenizer import Tokenizer, build_tokenizer
from megakd.errors import CorruptError, UsageError
from megakd.pipeline.evaluate.requests import Likelihood, figures, read_requests
from megakd.pipeline.evaluate.text import TextCodec


def line(doc_id: int, idx: int, context: str, continuation: str, label: Any, **more: Any) -> dict[str, Any]:
    request = {"context": context, "continuation": continuation}
    return {"doc_id": doc_id, "idx": idx, "request": request, "label": label, "task_name": "quiz", **more}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    data = "".join(json.dumps(entry) + "\n" for entry in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


QUIZ = [line(doc, i, f"Q{doc}", f" answer {'x' * i}é", doc % 3) for doc in range(5) for i in range(3)]


def test_reads_a_file_by_documents(tmp_path: Path) -> None:
    shuffled = [*QUIZ, line(1_000_003, 0, "Answer:", " alone", 0)]
    random.Random(1).shuffle(shuffled)
    file = read_requests(write(tmp_path / "rc_0shot" / "requests.jsonl.gz", shuffled))
    assert file.name == "quiz/rc_0shot" and len(file.documents) == 5
    for document in file.documents:
        assert document.continuations == tuple(f" answer {'x' * i}é" for i in range(3))
        assert document.label == document.doc_id % 3 and document.context == f"Q{document.doc_id}"
    assert len(file.pairs) == 15 and ("Q4", " answer é") in file.pairs


def test_limit_takes_the_first_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "mine.jsonl", QUIZ)
    assert [doc.doc_id for doc in read_requests(path, limit=2).documents] == [0, 1]
    assert [doc.doc_id for doc in read_requests(path, limit=0.5).documents] == [0, 1, 2]
    assert read_requests(path).name == "mine"
    assert read_requests(path, limit=2).fingerprint != read_requests(path).fingerprint


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ([{"doc_id": 1}], "line 1.*expected a JSON object"),
        ([line(0, 1, "a", " b", 0)], "continuations \\[1\\]"),
        ([line(0, 0, "a", " b", 2), line(0, 1, "a", " c", 2)], "label 2"),
        ([line(0, 0, "a", "", 0)], "empty continuation"),
        ([line(0, 0, "a", " b", 0), line(0, 0, "a", " c", 0)], "another continuation 0"),
        ([], "no request"),
    ],
)
def test_refuses_what_is_not_of_the_form(tmp_path: Path, broken: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        read_requests(write(tmp_path / "a" / "bad.jsonl", broken))


def test_refuses_a_cut_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "requests.jsonl.gz", QUIZ)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match="cut or damaged"):
        read_requests(path)


def test_figures_against_a_slow_twin(tmp_path: Path) -> None:
    rng = random.Random(3)
    file = read_requests(write(tmp_path / "a" / "q.jsonl", QUIZ))
    answers = [Likelihood(-rng.random() * 9, rng.random() < 0.5, rng.randint(1, 6)) for _ in file.pairs]
    found = figures(file.documents, answers)
    hits: dict[str, list[bool]] = {"acc": [], "acc_per_char": [], "acc_per_token": []}
    bits = 0.0
    for number, document in enumerate(file.documents):
        mine = answers[3 * number : 3 * number + 3]
        best = max(range(3), key=lambda i: mine[i].log_prob)
        per_char = max(range(3), key=lambda i: mine[i].log_prob / len(document.continuations[i]))
        per_token = max(range(3), key=lambda i: mine[i].log_prob / mine[i].num_tokens)
        for key, choice in zip(hits, (best, per_char, per_token)):
            hits[key].append(choice == document.label)
        bits -= mine[document.label].log_prob / math.log(2) / len(document.continuations[document.label].encode())
    for key, values in hits.items():
        mean = sum(values) / 5
        assert found[key] == pytest.approx(mean)
        assert found[f"{key}_stderr"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5))
    assert found["bits_per_byte"] == pytest.approx(bits / 5) and found["num_documents"] == 5


def test_figures_of_single_continuations(tmp_path: Path) -> None:
    words = [line(doc, 0, "The", f" word{doc}", ["word"]) for doc in range(4)]
    file = read_requests(write(tmp_path / "a" / "words.jsonl", words))
    found = figures(file.documents, [Likelihood(-1.0, doc < 3, 2) for doc in range(4)])
    assert found["acc_greedy"] == 0.75 and "acc" not in found
    assert found["bits_per_byte"] == pytest.approx(1 / math.log(2) / 6)


class Slow:
    """The rules of lm-eval's TemplateLM and of its hf back-end, without them."""

    def __init__(self, tokenizer: Tokenizer, prefix: int) -> None:
        self.tokenizer, self.prefix = tokenizer, prefix

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context == "":
            return [self.prefix], self.tokenizer.encode(continuation)
        while context[-1:].isspace():
            context, continuation = context[:-1], context[-1] + continuation
        both = self.tokenizer.encode(context + continuation)
        return self.tokenizer.encode(context), both[len(self.tokenizer.encode(context)) :]


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "ByteTokenizer"])
def test_pairs_are_cut_as_the_harness_cuts_them(tmp_path: Path, kind: Any) -> None:
    models = {
        "HuggingFaceTokenizer": lambda: train_byte_bpe(tmp_path / "bpe"),
        "SentencePieceTokenizer": lambda: train_sentencepiece(tmp_path / "m.model"),
        "ByteTokenizer": lambda: None,
    }
    tokenizer = build_tokenizer(kind, models[kind]())
    codec = TextCodec.of(tokenizer, add_bos_token=None, prefix_token_id=None)
    assert codec.prefix_token == (tokenizer.eod if tokenizer.bos is None else tokenizer.bos)
    slow = Slow(tokenizer, codec.prefix_token)
    texts = [text for text in text_lines() if len(text) > 30][:40]
    for number, text in enumerate(texts):
        cut = number % 17
        for context, continuation in ((text[:cut], text[cut:]), (text[:cut] + "  ", text[cut:]), ("", text)):
            assert codec.pair(context, continuation) == slow.pair(context, continuation)


def test_prefix_and_begin_of_text_are_refused_where_there_are_none(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", train_byte_bpe(tmp_path / "bpe"))
    with pytest.raises(UsageError, match="name no bos_token"):
        TextCodec.of(tokenizer, add_bos_token=True, prefix_token_id=None)
    with pytest.raises(UsageError, match="--prefix-token-id 9999"):
        TextCodec.of(tokenizer, add_bos_token=None, prefix_token_id=9999)


def line_of(context: str, continuation: str, index: int = 0) -> str:
    request = {"context": context, "continuation": continuation}
    return json.dumps({"doc_id": 0, "idx": index, "label": 0, "request": request}) + "\n"


@pytest.mark.parametrize("texts", [("a\ud800", " b"), ("a", " \udfff")])
def test_half_a_surrogate_pair_is_refused_by_its_line(tmp_path: Path, texts: tuple[str, str]) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line_of("a", " b") + line_of(*texts, index=1))
    with pytest.raises(UsageError, match="line 2: UnicodeEncodeError: .* surrogates not allowed; expected a JSON obj"):
        read_requests(file)
    file.write_text(line_of("a \U0001f40e", " b"))  # a whole pair, as JSON writes characters beyond the first plane
    assert read_requests(file).pairs == [("a \U0001f40e", " b")]
