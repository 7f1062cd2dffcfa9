"""Import of MiniPLM's ``scores_*.pt`` as scores of an imported dataset, whose documents are the scored instances."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, find_finished, say_complete
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.boundaries import INDEX_AND_IDS
from megakd.data.samples.documents import DocumentSamples
from megakd.data.scores.artefact import COUNTS, FORMAT, LOG_PROBS, MANIFEST, VERSION, finish_scores
from megakd.data.tokenizers.recorded import recorded_tokenizer
from megakd.errors import CorruptError, MismatchError, UsageError

MaskPolicy = Literal["all", "skip_after_eod"]
_CHUNK = 1 << 12
_LEAST = -1e-3


def import_scores(
    source: Path, dataset: IndexedDataset, output: Path, *, seq_length: int, mask_policy: MaskPolicy, eod: int | None
) -> Manifest:
    """Write the scores of ``source``, a ``.pt`` file or the folder of ``scores_0.pt, scores_1.pt, ...``, to ``output``.

    MiniPLM's values are means of the negative log-likelihood over an instance's scored tokens, in nats; megakd's are
    sums of log p, with counts. mask_policy: the scored positions; ``skip_after_eod``, which is MiniPLM's rule, leaves
    out those whose input is ``eod``.

    Raises UsageError if there are no scores, CorruptError for values that are no mean NLLs, MismatchError if their
    number is not that of the documents, or if ``output`` has other scores.
    """
    samples = DocumentSamples(dataset, seq_length)
    if mask_policy == "skip_after_eod" and eod is None:
        raise UsageError(
            "--scores-mask-policy skip_after_eod needs the end-of-document id: give the tokenizer, or --eod, or "
            "--scores-mask-policy all"
        )
    skipped = eod if mask_policy == "skip_after_eod" else None
    means = [_load(path) for path in _find(source)]
    total = sum(map(len, means))
    if total != samples.num_samples:
        raise MismatchError(
            f"{source}: {total} scores in {len(means)} files, {dataset.prefix} has {samples.num_samples} instances; "
            "they were not made from these shards, or some of either are missing"
        )
    hashed = xxhash.xxh3_128()
    for values in means:
        hashed.update(values.tobytes())
    parameters = {
        "packing": samples.packing,
        "seq_length": seq_length,
        "mask_policy": mask_policy,
        # an instance is a sample, so no document of the index starts inside one
        **({} if mask_policy == "all" else {"boundaries": INDEX_AND_IDS}),
        "precision": "fp16",  # the only one MiniPLM's scorer has by default; its files do not say
        "imported_from": "MiniPLM",
    }
    # The files name no model; a hash of their values stands for it.
    parents = {"dataset": dataset.fingerprint, "model": f"miniplm-scores:{hashed.hexdigest()}"}
    tokenizer = recorded_tokenizer(dataset)
    done = find_finished(
        output / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
        flag="--scores-output",
    )
    if done is not None:
        say_complete(output)
        return done
    counts = _counts(samples, skipped)
    return finish_scores(
        output,
        {LOG_PROBS: _log_probs(means, counts), COUNTS: [counts]},
        num_samples=total,
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
    )


def _find(source: Path) -> list[Path]:
    """The files in the order of their numbers. Uneven steps between numbers mean a missing file: CorruptError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UsageError(f"--scores {source}: no such file or folder")
    matches = [re.fullmatch(r"scores_(\d+)\.pt", path.name) for path in source.iterdir()]
    numbers = sorted(int(match[1]) for match in matches if match)
    if not numbers:
        raise UsageError(f"--scores {source}: no scores_0.pt, scores_1.pt, ... in it")
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    for before, gap in zip(numbers, gaps):
        if gap != min(gaps):
            raise CorruptError(f"{source / f'scores_{before + min(gaps)}.pt'}: missing between its neighbours")
    return [source / f"scores_{number}.pt" for number in numbers]


def _load(path: Path) -> NDArray[np.float32]:
    """Load the tensor of a file, without running any code that the file contains."""
    import torch  # late: only this needs it, and it takes a second

    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch's own message is left out: it advises to run the file's code
        raise CorruptError(
            f"{path}: not a file with a tensor and nothing else ({type(error).__name__}): cut, or not made by "
            "MiniPLM's scorer"
        ) from error
    is_tensor = isinstance(loaded, torch.Tensor) and loaded.layout == torch.strided
    if not is_tensor or loaded.ndim != 1 or not loaded.is_floating_point():
        content = f"{loaded.dtype} {list(loaded.shape)}" if is_tensor else type(loaded).__name__
        raise CorruptError(f"{path}: holds {content}, expected a tensor of one axis of floating-point numbers")
    means: NDArray[np.float32] = loaded.float().contiguous().numpy()
    bad = np.flatnonzero(~np.isfinite(means))
    if len(bad):
        raise CorruptError(f"{path}: {len(bad)} values are not finite, the first is {means[bad[0]]} at {bad[0]}")
    if len(means) and means.min() < _LEAST:
        raise CorruptError(
            f"{path}: value {means.min()} at {int(means.argmin())}: a mean negative log-likelihood is not negative; "
            "differences (diff_scores.pt) are made by 'megakd select' from the scores of both models"
        )
    return means


def _counts(samples: DocumentSamples, skipped: int | None) -> NDArray[np.int32]:
    """``[num_samples]`` int32: scored tokens of each sample. skipped: labels behind this id were not scored."""
    counts = np.zeros(samples.num_samples, dtype=np.int32)
    tokens = samples.dataset.tokens
    for first in range(0, samples.num_samples, _CHUNK):
        ids = np.arange(first, min(first + _CHUNK, samples.num_samples))
        starts, last_inputs = samples.starts(ids), samples.ends(ids) - 1
        scored = np.maximum(last_inputs - starts, 0)
        if skipped is not None:
            base = int(starts[0])
            before = np.concatenate(([0], np.cumsum(tokens[base : int(last_inputs[-1]) + 1] == skipped)))
            scored -= np.where(scored > 0, before[last_inputs - base] - before[starts - base], 0)
        counts[ids] = scored
    return counts


def _log_probs(means: Sequence[NDArray[np.float32]], counts: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
    first = 0
    for values in means:
        yield (-values.astype(np.float64) * counts[first : first + len(values)]).astype(np.float32)
        first += len(values)
