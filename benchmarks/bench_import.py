"""Import of a large Hugging Face folder: resident memory, and the rate beside that of copying its files.

    python benchmarks/bench_import.py [--gigabytes 2.2] [--shard-gigabytes 0.5] [--work FOLDER] [--json PATH]

A folder of a Llama in bfloat16, in shards, is written first, of random numbers. `megakd convert` and `cp` then read it
in turn, each time after the system was told to forget its pages, and each flushes what it wrote to disk; a third
process loads it into a model. Peaks are those that the kernel counts for a process (VmHWM), mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN, HEADS, GROUPS, VOCAB = 2048, 5632, 32, 8, 32_000
LOAD = """
import sys
from megakd.layout import ParallelConfig
from megakd.parallel import init_parallel
from megakd.model.checkpoint.load import load_weights
from megakd.model.checkpoint.record import read_record
from megakd.model.gpt import build_model
groups, record = init_parallel(ParallelConfig(), seed=1), read_record(sys.argv[1])
chunks = build_model(record.shape, groups, vocab_size=record.vocab_size, seq_length=128)
load_weights(record, chunks, groups)
print(sum(weight.nbytes for chunk in chunks for weight in chunk.parameters()))
"""


def main() -> None:
    """Print the table, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--shard-gigabytes", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        rows = measure(Path(folder), arguments.gigabytes, arguments.shard_gigabytes, arguments.repeats)
    for row in rows:
        verdict = "" if row["goal"] is None else f"  goal {row['goal']:.2f}: {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<62} {row['value']:>8.2f} {row['unit']:<5}{verdict}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(work: Path, gigabytes: float, shard_gigabytes: float, repeats: int) -> list[dict[str, Any]]:
    """Return all rows; ``goal`` is None where the line is there for information."""
    model = work / "model"
    write_model(model, gigabytes * 1e9, shard_gigabytes * 1e9)
    files = sorted(model.glob("*.safetensors"))
    size, largest = sum(file.stat().st_size for file in files), max(file.stat().st_size for file in files)
    copy_seconds, convert_seconds, peaks = [], [], []
    for _ in range(repeats):
        forget(files)
        copy_seconds.append(copy(files, work / "copy"))
        forget(files)
        convert = [sys.executable, "-W", "ignore", "-m", "megakd", "convert", "--load", str(model)]
        seconds, peak, _ = timed([*convert, "--save", str(work / "out")])
        convert_seconds.append(seconds)
        peaks.append(peak)
        remove(work / "out")
    _, load_peak, printed = timed([sys.executable, "-W", "ignore", "-c", LOAD, str(model)])
    _, small_peak, _ = timed([sys.executable, "-W", "ignore", "-c", "import megakd.train.loop"])
    weights_bytes = int(printed.split()[-1])
    copy_rate, convert_rate = size / min(copy_seconds) / 1e6, size / min(convert_seconds) / 1e6
    limit = 1.2 * largest / 1e9 + 0.5
    shards = f"{size / 1e9:.2f} GB in shards of {largest / 1e9:.2f}"
    return [
        _row(f"copy, {shards}", copy_rate, "MB/s", None),
        _row(f"convert, {shards}", convert_rate, "MB/s", copy_rate / 2, at_least=True),
        _row("convert: rate beside copy's", convert_rate / copy_rate, "x", 0.5, at_least=True),
        _row("convert: peak resident memory", max(peaks) / 1e9, "GB", limit),
        _row("loading into a model: peak beside its weights", (load_peak - weights_bytes) / 1e9, "GB", limit),
        _row("of that: torch and megatron-core alone", small_peak / 1e9, "GB", None),
    ]


def _row(name: str, value: float, unit: str, goal: float | None, *, at_least: bool = False) -> dict[str, Any]:
    met = goal is None or (value >= goal if at_least else value <= goal)
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met}


def write_model(folder: Path, total_bytes: float, shard_bytes: float) -> None:
    """Write the folder: as many layers as ``total_bytes`` hold, in shards of about ``shard_bytes``."""
    head = HIDDEN // HEADS
    layer = {
        "input_layernorm.weight": [HIDDEN],
        "post_attention_layernorm.weight": [HIDDEN],
        "self_attn.q_proj.weight": [HIDDEN, HIDDEN],
        "self_attn.k_proj.weight": [GROUPS * head, HIDDEN],
        "self_attn.v_proj.weight": [GROUPS * head, HIDDEN],
        "self_attn.o_proj.weight": [HIDDEN, HIDDEN],
        "mlp.gate_proj.weight": [FFN, HIDDEN],
        "mlp.up_proj.weight": [FFN, HIDDEN],
        "mlp.down_proj.weight": [HIDDEN, FFN],
    }
    outside = {"model.embed_tokens.weight": [VOCAB, HIDDEN], "model.norm.weight": [HIDDEN]}
    outside["lm_head.weight"] = [VOCAB, HIDDEN]
    layers = round((total_bytes - _bytes(outside.values())) / _bytes(layer.values()))
    sizes = outside | {f"model.layers.{i}.{name}": size for i in range(layers) for name, size in layer.items()}
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(_shards(sizes, shard_bytes)):
        file = f"model-{number:05d}.safetensors"
        _write_shard(folder / file, {name: sizes[name] for name in names}, seed=number)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": VOCAB,
        "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _bytes(sizes: Any) -> int:
    return sum(2 * int(np.prod(size)) for size in sizes)


def _shards(sizes: dict[str, list[int]], shard_bytes: float) -> Iterator[list[str]]:
    names: list[str] = []
    for name in sizes:
        names.append(name)
        if _bytes(sizes[name] for name in names) >= shard_bytes:
            yield names
            names = []
    if names:
        yield names


def _write_shard(file: Path, sizes: dict[str, list[int]], *, seed: int) -> None:
    header, place = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [place, place + _bytes([size])]}
        place += _bytes([size])
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(seed).integers(0, 256, 1 << 24, dtype=np.uint8).tobytes()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, place, len(numbers)):
            stream.write(numbers[: place - start])
        stream.flush()
        os.fsync(stream.fileno())


def forget(files: Sequence[Path]) -> None:
    """Tell the system to drop the files' pages, so that the next reader reads the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(files: Sequence[Path], target: Path) -> float:
    """Copy the files with ``cp``, flushed to disk; return seconds, and remove the copy."""
    target.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *map(str, files), str(target)], check=True)
    for file in target.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    remove(target)
    return seconds


def remove(folder: Path) -> None:
    """Remove a folder and what is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def timed(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a process; return its seconds, the largest resident memory in bytes and what it printed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command}: {printed}"
    return time.perf_counter() - start, usage.ru_maxrss * 1024, printed


if __name__ == "__main__":
    main()
