"""A real model under ``megakd evaluate`` and under transformers: log-likelihoods of requests, loss on a dataset.

    python benchmarks/check_evaluate.py --model hf/SmolLM2-135M --requests requests.jsonl.gz ... --limit 21
    python benchmarks/check_evaluate.py --model hf/SmolLM2-135M --data-path text_document --seq-length 512 --samples 24

Transformers sees every request and every sample by itself, in fp32, and its logits become log-probabilities in fp64.
Prints one JSON object; status 1 if a log-likelihood differs by 1e-3, a perplexity by 1e-4 of itself, or if a document
is decided otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.data.blend import Blend
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.pipeline.evaluate.requests import RequestFile, read_requests


def main() -> int:
    """Run both sides and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=21)
    parser.add_argument("--data-path")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=24)
    flags = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--log-samples", "--limit", str(flags.limit), "--requests", *flags.requests] if flags.requests else []
        if flags.data_path:
            asked += ["--data-path", flags.data_path, "--eval-samples", str(flags.samples)]
        command = [
            sys.executable,
            "-m",
            "megakd",
            "evaluate",
            "--load",
            flags.model,
            "--bf16",
            "false",
            "--log-samples",
        ]
        started = time.monotonic()
        subprocess.run([*command, "--seq-length", str(flags.seq_length), "--output", folder, *asked], check=True)
        rows["seconds_megakd"] = round(time.monotonic() - started, 1)
        started = time.monotonic()
        for path in flags.requests:
            file = read_requests(Path(path), limit=flags.limit)
            (log,) = Path(folder).glob(f"*-{file.name.replace('/', '-')}.jsonl")
            rows[file.name] = compare_requests(model, AutoTokenizer.from_pretrained(flags.model), file, log)
        if flags.data_path:
            (results,) = Path(folder).glob("*.json")
            rows["held_out"] = compare_loss(model, flags, json.loads(results.read_text())["held_out"])
        rows["seconds_transformers"] = round(time.monotonic() - started, 1)
    print(json.dumps(rows))
    parts = [row for row in rows.values() if isinstance(row, dict)]
    return int(any(row["difference"] > row["allowed"] or row.get("decided_otherwise") for row in parts))


@torch.no_grad()
def compare_requests(model: Any, tokenizer: Any, file: RequestFile, log: Path) -> dict[str, float]:
    """Compare the answers in ``log`` with the model's own, continuation by continuation."""
    worst = count = otherwise = 0
    for document, line in zip(file.documents, log.read_text().splitlines(), strict=True):
        ours = json.loads(line)
        theirs = []
        for i, (context, continuation) in enumerate(zip(document.contexts, document.continuations)):
            blanks = len(context) - len(context.rstrip())
            cut = context[: len(context) - blanks]
            whole, first = tokenizer.encode(context + continuation), tokenizer.encode(cut)
            log_probs_SV = torch.log_softmax(model(torch.tensor([whole[:-1]])).logits[0].double(), -1)
            rows_SV, labels_S = log_probs_SV[len(first) - 1 :], torch.tensor(whole[len(first) :])
            theirs.append(float(rows_SV.gather(1, labels_S[:, None]).sum()))
            worst = max(worst, abs(theirs[-1] - ours["log_probs"][i]))
            otherwise += bool((rows_SV.argmax(-1) == labels_S).all()) != ours["is_greedy"][i]
            count += 1
        best = theirs.index(max(theirs))
        otherwise += best != ours["log_probs"].index(max(ours["log_probs"]))
    return {"requests": count, "difference": worst, "allowed": 1e-3, "decided_otherwise": otherwise}


@torch.no_grad()
def compare_loss(model: Any, flags: argparse.Namespace, ours: dict[str, Any]) -> dict[str, float]:
    """Compare the perplexities on the same samples of a dataset, as a share of the model's own."""
    samples = ConcatSamples(IndexedDataset(flags.data_path), flags.seq_length)
    ids = Blend([samples], None, seed=0).draw(np.arange(flags.samples)).sample_id
    total, tokens = 0.0, 0
    for row, length in zip(samples.read(ids), samples.lengths(ids)):
        row_S = torch.from_numpy(row[:length].astype(np.int64))
        log_probs_SV = torch.log_softmax(model(row_S[None, :-1]).logits[0].double(), -1)
        total -= float(log_probs_SV.gather(1, row_S[1:, None]).sum())
        tokens += len(row_S) - 1
    perplexity = math.exp(total / tokens)
    difference = abs(ours["perplexity"] / perplexity - 1) if tokens == ours["num_tokens"] else math.inf
    return {"tokens": tokens, "perplexity": perplexity, "difference": difference, "allowed": 1e-4}


if __name__ == "__main__":
    sys.exit(main())
