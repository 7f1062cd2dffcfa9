"""What a checkpoint says about itself, read without torch: where it is, which model, which data, how far."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.manifest import Manifest, read_manifest
from megakd.model.config import ModelShape
from megakd.model.damage import MANIFEST, checkpoint_folders, damaged, faults_beside_tensors

FORMAT, VERSION = "megakd-checkpoint", 1
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class CheckpointRecord:
    """The manifest of one checkpoint, understood.

    loader_state: what ``Loader.state()`` returned. layout: sizes of the groups that wrote it. tokenizer: type, hash,
    vocab_size and eod of the data it was trained on, or None if the data had no manifest. objective_state: what the
    loss carries from step to step; empty for most, and in checkpoints that are older than it. parents: fingerprints of
    what it was made from. journal: those of the rows that the run had kept of its own model by then
    (``logits.journal``); None in checkpoints that are older. settings: what ``train.settings`` says of the run; None in
    checkpoints that are older, and in those that no run has written. manifest:
    with the hashes that loading holds its files against. role, flag: what it is to the command that reads it, and what
    chooses another one there, for messages.
    """

    path: Path
    fingerprint: str
    iteration: int
    shape: ModelShape
    vocab_size: int
    seq_length: int
    tokenizer: dict[str, Any] | None
    loader_state: dict[str, Any]
    layout: dict[str, int]
    use_distributed_optimizer: bool
    rng_states: bool
    objective_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    parents: dict[str, str] = dataclasses.field(default_factory=dict)
    journal: tuple[str, ...] | None = None
    settings: dict[str, Any] | None = None
    manifest: Manifest | None = None
    role: str = "checkpoint"
    flag: str = ""


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """``FOLDER/iter_0000100``, Megatron's name."""
    return Path(folder) / f"iter_{iteration:07d}"


def latest_iteration(folder: str | Path) -> int | None:
    """The iteration of the newest whole checkpoint in ``folder``; None if there is none.

    The tracker file is moved last, so it never names a half-written checkpoint. Where it is missing, the newest that
    has its manifest counts.

    Raises:
        CorruptError: the tracker file does not hold a number.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        whole = _whole_ones(Path(folder))
        return int(whole[-1].removeprefix("iter_")) if whole else None
    text = tracker.read_text(errors="replace").strip()
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise CorruptError(
            f"{tracker} holds {text[:40]!r}; expected the number of an iteration; whole checkpoints there: "
            f"{', '.join(_whole_ones(Path(folder))) or 'none'}: write the number of one into it"
        )
    return int(text)


def read_record(
    folder: str | Path, iteration: int | None = None, *, role: str = "checkpoint", flag: str = ""
) -> CheckpointRecord:
    """The record of a checkpoint in ``folder``: of ``iteration``, or the newest one.

    Its small files are hashed; the tensors are when they are loaded. role, flag: see `CheckpointRecord`.

    Raises:
        UsageError: there is no such checkpoint. CorruptError: files are missing, have another size or other content;
        names the checkpoint before it. MismatchError: written by an unknown version.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{role}: folder {folder} {'is a file' if Path(folder).exists() else 'does not exist'}")
    if iteration is None:
        iteration = latest_iteration(folder)
        if iteration is None:
            raise UsageError(f"{role}: {folder} holds no checkpoint ({TRACKER} is missing)")
    path = checkpoint_path(folder, iteration)
    if not (path / MANIFEST).exists():
        found = ", ".join(_whole_ones(Path(folder))) or "none"
        choose = f" ({flag} N takes another)" if flag else ""
        raise UsageError(f"{role}: {path} has no {MANIFEST}; whole checkpoints there: {found}{choose}")
    try:
        manifest = read_manifest(path / MANIFEST, format=FORMAT, version=VERSION)
        faults = faults_beside_tensors(manifest)
    except CorruptError as error:
        faults = [str(error)]
    if faults:
        raise damaged(path, faults, role=role, flag=flag, hash_all=False)
    return dataclasses.replace(_understand(manifest, path), role=role, flag=flag)


def _whole_ones(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def _understand(manifest: Manifest, path: Path) -> CheckpointRecord:
    values = dict(manifest.parameters)
    shape = dict(values["shape"])
    known = {field.name for field in dataclasses.fields(ModelShape)}
    needed = {field.name for field in dataclasses.fields(ModelShape) if field.default is dataclasses.MISSING}
    if not needed <= set(shape) <= known:
        raise MismatchError(
            f"{path}: the recorded model has keys {sorted(set(shape) ^ known)} that this version of megakd does not "
            "share; it was written by another version"
        )
    return CheckpointRecord(
        path=path,
        fingerprint=manifest.fingerprint,
        iteration=int(values["iteration"]),
        shape=ModelShape(**shape),
        vocab_size=int(values["vocab_size"]),
        seq_length=int(values["seq_length"]),
        tokenizer=None if manifest.tokenizer is None else dict(manifest.tokenizer),
        loader_state=dict(values["loader_state"]),
        layout=dict(values["layout"]),
        use_distributed_optimizer=bool(values["use_distributed_optimizer"]),
        rng_states=bool(values["rng_states"]),
        objective_state=dict(values.get("objective_state", {})),
        parents=dict(manifest.parents),
        journal=tuple(values["journal"]) if "journal" in values else None,
        settings=dict(values["settings"]) if "settings" in values else None,
        manifest=manifest,
    )


# what may change when a run continues: it does not touch weights or optimizer state
_FREE_KEYS = {
    "transformer_impl", "recompute_granularity", "recompute_method", "recompute_num_layers", "hidden_dropout",
    "attention_dropout", "init_method_std", "moe_token_dispatcher_type", "moe_aux_loss_coeff", "fp8_format",
    "fp8_recipe", "fp8_param_gather", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
    "fp4_format", "first_last_layers_bf16", "make_vocab_size_divisible_by",
}  # fmt: skip


def check_resume(
    record: CheckpointRecord, shape: ModelShape, *, vocab_size: int, use_distributed_optimizer: bool
) -> None:
    """Refuse to continue a run with another model than it was started with.

    Raises:
        MismatchError: names every key that differs, with both values.
    """
    then, now = dataclasses.asdict(record.shape), dataclasses.asdict(shape)
    differing = {key: (then[key], now[key]) for key in now if key not in _FREE_KEYS and then[key] != now[key]}
    if record.vocab_size != vocab_size:
        differing["vocab_size"] = (record.vocab_size, vocab_size)
    if record.use_distributed_optimizer != use_distributed_optimizer:
        differing["use_distributed_optimizer"] = (record.use_distributed_optimizer, use_distributed_optimizer)
    if differing:
        lines = ", ".join(f"{key}: {old} there, {new} here" for key, (old, new) in differing.items())
        raise MismatchError(f"{record.path} belongs to another configuration: {lines}")
