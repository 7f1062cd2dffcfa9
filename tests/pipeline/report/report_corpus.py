"""A corpus with scores for tests of reports, and a report's page as a browser sees it."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from pipeline.select.select_twin import scores_of, write

from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.samples.packing import open_samples
from megakd.data.selection import Selection
from megakd.data.tokenizer import ByteTokenizer
from megakd.pipeline.report.main import main
from megakd.pipeline.select.main import main as select

SEQ = 30
HOSTILE = "<script>alert('&amp;')</script>\u202e \x07]]></pre>\"$x$"


class Corpus:
    """Documents of text, and scores of a teacher and of two references over its samples."""

    def __init__(self, folder: Path, packing: Any = "concat", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        texts = [HOSTILE * 4, *("word " * int(n) + "end. " for n in rng.integers(1, 40, 50))]
        documents = [[*text.encode(), 256] for text in texts]
        with IndexedWriter(folder / "data", np.uint16) as writer:
            writer.add_documents(
                np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents], np.int32)
            )
            writer.finish(tokenizer=ByteTokenizer().describe())
        self.folder, self.dataset = folder, IndexedDataset(folder / "data")
        self.samples = open_samples(packing, self.dataset, SEQ, ByteTokenizer)
        n = self.samples.num_samples
        self.counts = self.samples.lengths(np.arange(n)) - 1
        self.counts[rng.random(n) < 0.1] = 0
        common = rng.normal(3, 1, n)
        self.log_probs = {
            name: (-(common + rng.normal(0.2, 0.4, n)).round(1) * self.counts).astype(np.float32) for name in "tro"
        }
        self.log_probs["t"][1] = -50.0 * max(1, self.counts[1])  # the smallest by far
        self.told = {"dataset": self.dataset.fingerprint, "seq_length": SEQ, "packing": packing}
        for name, values in self.log_probs.items():
            write(folder / name, values, self.counts, model=name, tokenizer=ByteTokenizer().describe(), **self.told)
        self.ids = np.flatnonzero(self.counts)

    def flags(self, *more: Any) -> list[str]:
        given = ["--teacher-scores", self.folder / "t", "--reference-scores", self.folder / "r", *more]
        return [str(word) for word in given]

    def report(self, *more: Any) -> dict[str, list[dict[str, str]]]:
        (self.folder / "out" / "report.json").unlink(missing_ok=True)
        assert main(self.flags("--output", self.folder / "out", *more)) == 0
        return {path.stem: list(csv.DictReader(path.open())) for path in (self.folder / "out").glob("*.csv")}

    def select(self, *more: Any) -> list[int]:
        (self.folder / "kept" / "selection.json").unlink(missing_ok=True)
        assert select(self.flags("--output", self.folder / "kept", *more)) == 0
        return [int(i) for i in Selection(self.folder / "kept").ids]

    def columns(self, scale: float = 1.0) -> dict[str, Any]:
        """NLLs and scores of the candidates alone."""
        count = self.counts[self.ids]
        values = {name: each[self.ids] for name, each in self.log_probs.items()}
        return {
            "NLL of the teacher": -values["t"] / count.astype(np.float32),
            "NLL of the reference": -values["r"] / count.astype(np.float32),
            "score": scores_of([(1.0, values["r"]), (-scale, values["t"])], count),
            "other score": scores_of([(1.0, values["o"]), (-scale, values["t"])], count),
        }


class Page(HTMLParser):
    """Tags, attributes and text as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._style = tag == "style"
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data
