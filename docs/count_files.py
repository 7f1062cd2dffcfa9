"""Count the files of megakd/ that one step, one score and one selection go through.

    python docs/count_files.py [--list]

The method: a tiny teacher and a tiny student are trained for one step on one process, with dense forward KL and the
loss in plain torch; the samples are scored under both, and half of them selected. While that runs, every function of
megakd that is called is noted with its file. What is counted:

- step: files with a function that is called between the entry of ``run_step`` and the return of ``Optimizer.step``:
  from a batch to updated weights, no evaluation, record or checkpoint;
- score, selection: files with a function that is called between ``main(argv)`` of the verb and its return: from flags
  to what is committed.

Calls that are made while a module is imported do not count, nor do comprehensions and the methods that dataclasses are
given. The interpreter of another checkout's environment counts there: the script knows no file by its name.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

MODEL = ["--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"]
RUN = ["--train-iters", "1", "--global-batch-size", "2", "--micro-batch-size", "2", "--eval-interval", "1000"]
STEP = {"begin": "run_step", "end": "Optimizer.step"}


class Notes:
    """Files whose functions are called, while the stretch that counts is running."""

    def __init__(self, begin: str | None, end: str | None, inside: Path) -> None:
        self._begin, self._end, self._inside = begin, end, f"{inside}{os.sep}"
        self._counts = begin is None
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code: CodeType = frame.f_code
        if not code.co_filename.startswith(self._inside):
            return
        if event == "call" and code.co_qualname == self._begin:
            self._counts = True
        file = code.co_filename[len(self._inside) :]
        if event == "call" and self._counts and file not in self.files and is_function(code) and not importing(frame):
            self.files.add(file)
        if event == "return" and code.co_qualname == self._end:
            self._counts = False


def is_function(code: CodeType) -> bool:
    """False for bodies of modules and classes, for comprehensions and lambdas."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def importing(frame: FrameType | None) -> bool:
    """True if a call is made while a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def note(argv: Sequence[str], begin: str | None, end: str | None, result: Path) -> None:
    """Run one verb in this process and write which files it went through."""
    import megakd
    from megakd.__main__ import main

    assert megakd.__file__ is not None
    notes = Notes(begin, end, Path(megakd.__file__).parent)
    threading.setprofile(notes)
    sys.setprofile(notes)
    try:
        status = main(argv)
    finally:
        sys.setprofile(None)
    assert status == 0, f"megakd {' '.join(argv)} ended with {status}"
    result.write_text(json.dumps(sorted(notes.files - {"__main__.py"})))


def count() -> dict[str, list[str]]:
    """Files by what is done."""
    with tempfile.TemporaryDirectory() as folder:

        def megakd(*argv: str, begin: str = "", end: str = "") -> list[str]:
            result = Path(folder, "files.json")
            command = [sys.executable, __file__, "--note", str(result), begin, end, *argv]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr + done.stdout
            return list(json.loads(result.read_text()))

        text = [{"text": f"{number} and {number * number} are numbers"} for number in range(40)]
        Path(folder, "text.jsonl").write_text("\n".join(map(json.dumps, text)) + "\n")
        megakd("preprocess", *["--input", "text.jsonl", "--output-prefix", "data", "--tokenizer-type", "ByteTokenizer"])
        data = ["--data-path", "data_text_document"]
        train = ["train", *data, *MODEL, *RUN, "--loss-implementation", "reference"]
        for name in ("teacher", "reference"):
            megakd(*train, "--seed", str(len(name)), "--save", name)
        step = megakd(*train, "--teacher-load", "teacher", "--save", "student", **STEP)
        for name in ("teacher", "reference"):
            score = megakd("score", *data, "--load", name, "--seq-length", "16", "--output", f"{name}-scores")
        scores = ["--teacher-scores", "teacher-scores", "--reference-scores", "reference-scores"]
        selection = megakd("select", *scores, "--ratio", "0.5", "--output", "half")
        return {"one step": step, "one score": score, "one selection": selection}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--note"]:
        note(sys.argv[5:], sys.argv[3] or None, sys.argv[4] or None, Path(sys.argv[2]))
        sys.exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the files too")
    with_names = parser.parse_args().list
    for name, files in count().items():
        print(f"{name}: {len(files)} files")
        print("".join(f"  {file}\n" for file in files) if with_names else "", end="")
