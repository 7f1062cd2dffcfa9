"""Files of ready requests: lines that cannot be scored are refused by file and number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megakd.errors import UsageError
from megakd.pipeline.evaluate.requests import read_requests


def line(context: str, continuation: str, index: int = 0) -> str:
    request = {"context": context, "continuation": continuation}
    return json.dumps({"doc_id": 0, "idx": index, "label": 0, "request": request}) + "\n"


@pytest.mark.parametrize("texts", [("a\ud800", " b"), ("a", " \udfff")])
def test_half_a_surrogate_pair_is_refused_by_its_line(tmp_path: Path, texts: tuple[str, str]) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line("a", " b") + line(*texts, index=1))
    with pytest.raises(UsageError, match="line 2: UnicodeEncodeError: .* surrogates not allowed; expected a JSON obj"):
        read_requests(file)
    file.write_text(line("a \U0001f40e", " b"))  # a whole pair, as JSON writes characters beyond the first plane
    assert read_requests(file).pairs == [("a \U0001f40e", " b")]
