"""The identity of a logits store: the values that decide its bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits import shard as shards
from megakd.logits.codec import Rounding, RowFormat, ValueBits, invert
from megakd.targets import SparseKind

FORMAT, VERSION, READABLE = "megakd-logits", 2, (1, 2)
_YOUNGER = {"proposal_exponent", "rounding"}  # fields that the first stores lack; their defaults describe those stores
MANIFEST, ORDER, SHARDS = "store.json", "order.i32", "shards"
_RANKS = "ranks.i32"  # version 1's file: the rank of every id
DEFAULT_DRAWS: dict[str, int] = {"top_p_k": 0, "samples": 50, "renormalised_samples": 256}
"""Kind -> draws for a row: none for ``top_p_k``; 50 as in arXiv 2503.16870; 256 as in Gemma 3."""


@dataclass(frozen=True)
class StoreSpec:
    """Identity of a store: equal specs give equal bytes, however the work was divided.

    kind, value_bits, draws: see ``codec.RowFormat``.
    top_k, top_p: the cut of a row (``sparsify.top_p_k``); 0 and 1.0 for kinds that are drawn.
    seed: seed of the draws. proposal_exponent: for ``samples``, the power of the teacher's probabilities that ids are
        drawn in proportion to.
    rounding: rounding of the weights that an exponent other than 1 gives; see ``codec.RowFormat``.
    vocab_size: number of ids in the teacher's distribution, without padding.
    packing, seq_length, num_samples: those of the dataset. shard_samples: number of samples in a shard's range.
    parents: fingerprints of ``dataset`` and ``model``. tokenizer: the record of the dataset's tokenizer.
    details: anything else that the rows depend on, such as precision and training step of the teacher.
    """

    kind: SparseKind
    vocab_size: int
    packing: str
    seq_length: int
    num_samples: int
    shard_samples: int
    parents: Mapping[str, str]
    tokenizer: Mapping[str, Any] | None = None
    value_bits: ValueBits = 8
    draws: int = 0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    proposal_exponent: float = 1.0
    rounding: Rounding = "nearest"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.seq_length, self.num_samples, self.shard_samples) < 1:
            raise UsageError(f"{self}: vocab_size, seq_length, num_samples and shard_samples: expected at least 1")
        if not {"dataset", "model"} <= set(self.parents):
            raise UsageError(f"parents {sorted(self.parents)}: expected dataset and model")
        _ = self.row_format  # raises UsageError for fields that make no format

    @staticmethod
    def rows(
        kind: SparseKind,
        *,
        value_bits: str,
        draws: int | None,
        top_k: int,
        top_p: float,
        seed: int,
        proposal_exponent: float = 1.0,
    ) -> dict[str, Any]:
        """Make the fields that describe a row, from settings of which some are unused for the kind.

        value_bits: a flag's "8", "16" or "32". draws: None for the default of the kind.
        """
        best = kind == "top_p_k"
        return {
            "kind": kind,
            "value_bits": bits_of(kind, value_bits, weighted=proposal_exponent != 1),
            "draws": DEFAULT_DRAWS[kind] if draws is None else draws,
            "top_k": top_k if best else 0,
            "top_p": top_p if best else 1.0,
            "seed": 0 if best else seed,
            "proposal_exponent": proposal_exponent,
            "rounding": "nearest" if proposal_exponent == 1 else "random",
        }

    @property
    def row_format(self) -> RowFormat:
        weighted = self.proposal_exponent != 1
        return RowFormat(self.kind, self.value_bits, self.draws, weighted=weighted, rounding=self.rounding)

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_samples)

    def samples_of(self, shard: int) -> tuple[int, int]:
        """Return the first sample of a shard, and the one after its last."""
        return shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.num_samples)

    def parameters(self, frequency_ranks: NDArray[np.int32]) -> dict[str, Any]:
        """Parameters for the manifests of store and shards, with the hash of the frequency ranks."""
        without = {"parents", "tokenizer", "details"} | ({"rounding"} if self.rounding == "nearest" else set())
        plain = {name: value for name, value in vars(self).items() if name not in without}
        hashed = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(frequency_ranks, "<i4").data)
        return {**plain, "details": dict(self.details), "ranks": hashed}

    def check(self, manifest: Manifest, frequency_ranks: NDArray[np.int32]) -> None:
        """Raise MismatchError, with the differences, for the manifest of another store."""
        check_identity(manifest, self.parameters(frequency_ranks), self, "holds another store than this")

    @staticmethod
    def of(manifest: Manifest) -> StoreSpec:
        """Make the spec from the manifest of a store or of a shard."""
        names = set(StoreSpec.__dataclass_fields__) - {"parents", "tokenizer"}
        if missing := names - set(manifest.parameters) - _YOUNGER:
            raise CorruptError(f"{manifest.path}: parameters without {', '.join(sorted(missing))}")
        fields = {name: manifest.parameters[name] for name in names & set(manifest.parameters)}
        return StoreSpec(**fields, parents=manifest.parents, tokenizer=manifest.tokenizer)


def bits_of(kind: SparseKind, flag: str, *, weighted: bool = False) -> ValueBits:
    """Bits of a stored log-probability, from a flag's "8", "16" or "32". Counts store none; 8 is recorded for them."""
    bits: dict[str, ValueBits] = {"8": 8, "16": 16, "32": 32}
    return 8 if kind == "samples" and not weighted else bits[flag]


def shard_path(folder: str | os.PathLike[str], shard: int) -> Path:
    """Path of the manifest of a shard."""
    return Path(folder) / SHARDS / f"{shard:08d}.json"


def check_identity(manifest: Manifest, parameters: Mapping[str, Any], spec: StoreSpec, what: str) -> None:
    """Raise MismatchError, with the differences, unless a manifest has the parameters, parents and tokenizer."""
    if wrong := manifest.differences(parameters, spec.parents, spec.tokenizer):
        raise MismatchError(f"{manifest.path} {what}: {'; '.join(wrong)}. Give another --output")


def read_ids_of_ranks(manifest: Manifest) -> NDArray[np.int32]:
    """Read the id of each frequency rank, int32 ``[V]``, of the store with this manifest.

    Raises CorruptError if the file is not what was written.
    """
    folder, spec = manifest.path.parent, StoreSpec.of(manifest)
    path = folder / (_RANKS if manifest.version == 1 else ORDER)
    found = np.fromfile(path, "<i4").astype(np.int32)
    try:
        ids_of_ranks = invert(found) if manifest.version == 1 else _lengthened(found, spec.vocab_size)
        frequency_ranks = invert(ids_of_ranks)
    except UsageError:
        frequency_ranks = np.empty(0, np.int32)
    if spec.parameters(frequency_ranks)["ranks"] != manifest.parameters["ranks"]:
        raise CorruptError(f"{path}: it is not what was written: {shards.REPAIR}")
    return ids_of_ranks


def _lengthened(first: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """Append all ids that are missing, rising. Raises UsageError for ids outside the vocabulary."""
    if len(first) and not 0 <= int(first.min()) <= int(first.max()) < vocab_size:
        raise UsageError(f"ids of ranks beyond {vocab_size}")
    is_left = np.ones(vocab_size, np.bool_)
    is_left[first] = False
    whole: NDArray[np.int32] = np.concatenate([first, np.flatnonzero(is_left).astype(np.int32)])
    return whole
