"""preprocess against Megatron's preprocess_data.py: CPU seconds of the whole process tree, memory, and the same files.

    python benchmarks/bench_preprocess.py [--mb 150] [--repeats 3] [--json PATH]

The corpus is text that the machine has: Python, C and Perl sources, manual pages, documentation, in documents of a
few kilobytes. With MEGATRON_LM naming a checkout, its tools/preprocess_data.py runs unchanged (it needs transformers).
Without one, a STAND-IN written here does the same work for each document: a pool of processes that parses the line,
makes tokens and then ids as Python lists and sends them back to a megatron-core IndexedDatasetBuilder. With
transformers installed the ids come from megatron-core's own tokenizer class, as in the tool; else from tokenizers,
which is leaner. Its start-up, which imports megatron-core and with it torch, is counted on its side; the ratio
therefore depends on --mb.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 32000
TRAIN_BYTES = 20_000_000
DOCUMENT_BYTES = 6000
GOALS = {"bpe": 40.0, "sp": 5.0, "sp by its reference engine": 1.2, "resident MB": 400.0}
# The split of GPT-4's and Qwen's tokenizers.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TYPES = {"bpe": "HuggingFaceTokenizer", "sp": "SentencePieceTokenizer"}


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    wall_seconds: float
    cpu_seconds: float
    resident_mb: float
    errors: str


def main() -> None:
    """Print the table, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=150, help="megabytes of text")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours, the median counts; the peer runs once")
    parser.add_argument("--workers", type=int, default=0, help="on both sides (default: one for each core)")
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stand-in", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stand_in:
        stand_in(*arguments.stand_in)
        return
    workers = arguments.workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        rows = measure(Path(folder), arguments.mb, workers, arguments.repeats)
    print(f"\n{'work':<74} {'value':>9} {'':<14} {'goal':>8}")
    for row in rows:
        verdict = "" if row["goal"] is None else f"{row['goal']:>8g} {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<74} {row['value']:>9.1f} {row['unit']:<14} {verdict}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(folder: Path, mb: int, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of name, value, unit, goal, met."""
    corpus = folder / "corpus.jsonl"
    text_mb = write_corpus(corpus, mb * 1_000_000) / 1e6
    print(f"corpus: {text_mb:.1f} MB of text in {corpus.stat().st_size / 1e6:.1f} MB of JSON lines", flush=True)
    models = {"bpe": train_bpe(corpus, folder / "bpe"), "sp": train_sp(corpus, folder / "sp.model")}
    rows: list[dict[str, Any]] = []

    def row(name: str, value: float, unit: str, goal: float | None = None, met: bool | None = None) -> None:
        rows.append({"name": name, "value": round(value, 3), "unit": unit, "goal": goal, "met": met})

    for kind, model in models.items():
        ours_out, peer_out = folder / f"ours_{kind}", folder / f"peer_{kind}"
        flags = [
            "--input",
            str(corpus),
            "--tokenizer-type",
            TYPES[kind],
            "--tokenizer-model",
            str(model),
            "--append-eod",
        ]
        flags += ["--workers", str(workers)]
        command = [sys.executable, "-m", "megakd", "preprocess", *flags, "--output-prefix", str(ours_out)]
        ours = run(command, repeats, outputs=f"{ours_out.name}_*", folder=folder)
        print(f"{kind}: {ours.errors.splitlines()[0]}", flush=True)
        peer_name, command = peer_command(kind, corpus, model, peer_out, workers, flags)
        peer = run(command, 1, outputs=f"{peer_out.name}_*", folder=folder)
        same = all(
            Path(f"{ours_out}_text_document{end}").read_bytes() == Path(f"{peer_out}_text_document{end}").read_bytes()
            for end in (".bin", ".idx")
        )
        fast = "engine: gigatoken" in ours.errors
        goal = GOALS[kind] if fast or kind == "bpe" else GOALS["sp by its reference engine"]
        ratio = peer.cpu_seconds / ours.cpu_seconds
        what = f"{kind} {text_mb:.0f} MB"
        row(f"{what}: CPU time of {peer_name} over ours", ratio, "x", goal, ratio >= goal)
        row(f"{what}: files equal to those of {peer_name}", float(same), "(1 is yes)", 1.0, same)
        row(
            f"{what}: peak resident memory, {workers} workers and all",
            ours.resident_mb,
            "MB",
            GOALS["resident MB"],
            ours.resident_mb <= GOALS["resident MB"],
        )
        row(f"{what}: peak resident memory of {peer_name}", peer.resident_mb, "MB")
        for side, done in (("ours", ours), (peer_name, peer)):
            row(f"{what}: {side}, CPU", done.cpu_seconds, "s")
            row(f"{what}: {side}, text per CPU second", text_mb / done.cpu_seconds, "MB/s")
            row(f"{what}: {side}, text per wall second", text_mb / done.wall_seconds, "MB/s")
    return rows


def peer_command(
    kind: str, corpus: Path, model: Path, out: Path, workers: int, flags: list[str]
) -> tuple[str, list[str]]:
    """Megatron's own tool where there is a checkout, else the stand-in."""
    checkout = os.environ.get("MEGATRON_LM")
    if checkout:
        tool = [sys.executable, f"{checkout}/tools/preprocess_data.py", *flags, "--output-prefix", str(out)]
        return "preprocess_data.py", [*tool, "--log-interval", "1000000"]
    name = "stand-in" if importlib.util.find_spec("transformers") is None else "stand-in with megatron's tokenizer"
    return name, [sys.executable, __file__, "--stand-in", kind, str(corpus), str(model), str(out), str(workers)]


def run(command: list[str], repeats: int, *, outputs: str, folder: Path) -> Run:
    """The run with the median CPU time, and the memory of one more run, as watching it slows the processes down.

    outputs: glob of the files that each run makes in ``folder``; they are removed first, as a finished dataset is kept.
    """

    def once(watch_memory: bool) -> Run:
        for path in folder.glob(outputs):
            path.unlink()
        return run_once(command, watch_memory=watch_memory)

    watched = once(True)
    runs = sorted((once(False) for _ in range(repeats)), key=lambda run: run.cpu_seconds)
    middle = runs[(len(runs) - 1) // 2]
    return Run(middle.wall_seconds, middle.cpu_seconds, watched.resident_mb, middle.errors)


def run_once(command: list[str], *, watch_memory: bool) -> Run:
    """CPU seconds and proportional memory of the process and all its descendants."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], sum(map(resident_bytes, descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    if watch_memory:
        watcher.start()
    _, errors = process.communicate()
    wall = time.perf_counter() - started
    ended.set()
    if watch_memory:
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}\n{errors[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, peak[0] / 1e6, errors)


def descendants(pid: int) -> Iterator[int]:
    """The process and every process below it."""
    yield pid
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        below = " ".join(Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks)
    except OSError:
        return
    for child in below.split():
        yield from descendants(int(child))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, pages shared with others counted by their share (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


# The stand-in for Megatron's tool.


class Encoder:
    """Work of each process of the pool on a line."""

    engine: Any = None
    megatron: Any = None
    eod = 0

    def __init__(self, kind: str, model: str) -> None:
        self.kind, self.model = kind, model

    def load(self) -> None:
        """Load the tokenizer once a process."""
        if self.kind == "bpe" and importlib.util.find_spec("transformers"):
            from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

            Encoder.megatron = HuggingFaceTokenizer(self.model)
            Encoder.eod = Encoder.megatron.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        elif self.kind == "bpe":
            from tokenizers import Tokenizer

            Encoder.engine = Tokenizer.from_file(f"{self.model}/tokenizer.json")
            Encoder.eod = Encoder.engine.token_to_id("<|endoftext|>")
        else:
            import sentencepiece

            Encoder.engine = sentencepiece.SentencePieceProcessor(model_file=self.model)
            Encoder.eod = Encoder.engine.eos_id()

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """The ids of one document, as the tool returns them: for "bpe" tokens first, and then the id of each."""
        text = json.loads(line)["text"]
        if Encoder.megatron is not None:
            ids = Encoder.megatron.text_to_ids(text)
        elif self.kind == "bpe":
            ids = [
                Encoder.engine.token_to_id(token)
                for token in Encoder.engine.encode(text, add_special_tokens=False).tokens
            ]
        else:
            ids = Encoder.engine.encode_as_ids(text)
        ids.append(Encoder.eod)
        return {"text": ids}, {"text": [len(ids)]}, len(line)


def stand_in(kind: str, corpus: str, model: str, out: str, workers: str) -> None:
    """Do what tools/preprocess_data.py does, with megatron-core's builder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder = Encoder(kind, model)
    with multiprocessing.Pool(int(workers), initializer=encoder.load) as pool, open(corpus, encoding="utf-8") as lines:
        builder = IndexedDatasetBuilder(f"{out}_text_document.bin", dtype=np.uint16)
        for document, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(document["text"], lengths["text"])
        builder.finalize(f"{out}_text_document.idx")
        pool.close()
        pool.join()


# The corpus and the models.


def write_corpus(path: Path, num_bytes: int) -> int:
    """Documents in an order drawn from a fixed seed; returns the bytes of text, which may be fewer than asked for."""
    files = sorted({file for place in places() for file in place})
    random.Random(0).shuffle(files)
    seen: set[bytes] = set()
    written = 0
    with open(path, "w", encoding="utf-8") as out:
        for file in files:
            for document in documents(file):
                digest = hashlib.blake2b(document.encode(), digest_size=12).digest()
                if digest not in seen:
                    seen.add(digest)
                    out.write(json.dumps({"text": document, "source": file}, ensure_ascii=False) + "\n")
                    written += len(document.encode())
            if written >= num_bytes:
                break
    return written


def places() -> Iterator[Iterator[str]]:
    """Files of text that a machine has, an iterator for each place."""
    paths = sysconfig.get_paths()
    yield from (walk(paths[key], (".py", ".pyi", ".rst", ".txt", ".md", ".h", ".c")) for key in ("stdlib", "purelib"))
    yield walk("/usr/share/man", (".gz",))
    yield walk("/usr/share/doc", ("",))
    yield walk("/usr/share/perl", (".pm", ".pod", ".pl"))
    yield walk("/usr/include", (".h", ".hpp"))
    yield walk("/usr/local", (".py", ".h", ".html", ".md", ".rst"))


def walk(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder whose names end so."""
    for folder, _, names in os.walk(root):
        yield from (os.path.join(folder, name) for name in names if name.endswith(suffixes))


def documents(file: str) -> Iterator[str]:
    """A file's text in pieces of at most DOCUMENT_BYTES characters, cut at blank lines; nothing if it is no text."""
    try:
        data = gzip.open(file).read() if file.endswith(".gz") else Path(file).read_bytes()
        text = data[: 4 << 20].decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return
    if file.endswith((".html", ".htm")):
        text = re.sub(r"<[^>]+>", " ", text)
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > DOCUMENT_BYTES:
            yield piece
            piece = ""
        piece += paragraph + "\n\n"
    if piece.strip():
        yield piece


def texts(corpus: Path) -> Iterator[str]:
    """Documents for training a tokenizer."""
    left = TRAIN_BYTES
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            left -= len(text)
            yield text
            if left < 0:
                return


def train_bpe(corpus: Path, folder: Path) -> Path:
    """A byte-level BPE, saved as transformers saves one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 10**12}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sp(corpus: Path, path: Path) -> Path:
    """A BPE with byte fallback, as Llama 2's."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line[:4000] for text in texts(corpus) for line in text.split("\n") if line.strip()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=2,
        minloglevel=2,
    )
    return path


if __name__ == "__main__":
    main()
