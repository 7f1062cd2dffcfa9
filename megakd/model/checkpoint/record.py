"""Record of a checkpoint, read without torch: its place, model, data and progress."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.model.checkpoint.damage import FORMAT, MANIFEST, VERSION, checkpoint_folders, damaged, faults_beside_tensors
from megakd.model.checkpoint.foreign import check_backends, describe_foreign, is_checkpoint
from megakd.model.config import ModelShape
from megakd.model.huggingface.folder import describe_folder, files_of_no_model, is_hf_folder

__all__ = ["FORMAT", "MANIFEST", "TRACKER", "VERSION", "CheckpointRecord", "check_resume", "checkpoint_path",
           "latest_iteration", "read_record"]  # fmt: skip

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"  # Megatron-LM's name of a checkpoint that was converted, in place of an iteration


@dataclass(frozen=True)
class CheckpointRecord:
    """Description of one checkpoint, read from its manifest.

    loader_state: result of ``Loader.state()``. layout: sizes of the groups that wrote it. tokenizer: type, hash,
    vocab_size and eod of the data it was trained on; None if the data had no manifest. objective_state: state of the
    loss, such as taid's; empty for most losses and in older checkpoints. parents: fingerprints of the data, teacher and
    stores that it was made from. journal: fingerprints of the segments that the run had kept of its own model by then
    (``logits.journal``); None in older checkpoints. settings: those of ``train.settings``; None in older checkpoints
    and in those that no run has written. manifest: has the hashes that loading compares the files with. role, flag: for
    messages, the checkpoint's role in the command that reads it, and the flag that chooses another one. foreign:
    written by Megatron-LM or plain megatron-core, so that it has weights to start from but no run to continue. checked:
    its manifest was there before it was read. rows: of the embedding, if nothing else is known about the vocabulary, as
    in foreign checkpoints; None after `of_vocabulary`. form: of the files, megatron-core's or a Hugging Face folder.
    huggingface: configuration of the Hugging Face folder that the weights come from (``folder.settings_of``); None for
    others.
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
    foreign: bool = False
    checked: bool = True
    rows: int | None = None
    form: Literal["torch_dist", "huggingface"] = "torch_dist"
    huggingface: dict[str, Any] | None = None

    @property
    def tokenizer_by_file(self) -> bool:
        """True if the tokenizer is known by its file alone, which does not tell how documents of a corpus end."""
        return self.huggingface is not None and self.tokenizer is not None

    def of_vocabulary(self, vocab_size: int) -> CheckpointRecord:
        """Return the record with the true vocabulary, that of the data's tokenizer; unchanged if it records its own.

        Raises:
            MismatchError: the embedding has fewer rows.
        """
        if self.rows is None:
            return self
        if vocab_size > self.rows:
            raise MismatchError(
                f"{self.role}: {self.path} has an embedding of {self.rows} rows, the vocabulary of the data is "
                f"{vocab_size}: it was trained with another tokenizer"
            )
        return dataclasses.replace(self, vocab_size=vocab_size, rows=None)


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Return ``FOLDER/iter_0000100``, Megatron's name of a checkpoint."""
    return Path(folder) / f"iter_{iteration:07d}"


def latest_iteration(folder: str | Path) -> int | None:
    """Return the iteration of the newest whole checkpoint in ``folder``; None if there is none.

    The tracker file is moved last, so that it never names a half-written checkpoint. Without it, the newest finished
    checkpoint counts. Megatron-LM's ``release`` is 0.

    Raises:
        CorruptError: the tracker file does not hold a number.
    """
    path = _latest(Path(folder))
    return None if path is None else _iteration(path)


def read_record(
    folder: str | Path,
    iteration: int | None = None,
    *,
    role: str = "checkpoint",
    flag: str = "",
    shape: ModelShape | None = None,
) -> CheckpointRecord:
    """Read the record of a checkpoint in ``folder``: of ``iteration``, or the newest.

    ``folder`` may also be a checkpoint itself, or a Hugging Face folder.

    Its small files are hashed now, the tensors when they are loaded. A checkpoint without a manifest is read whole,
    with a warning that it cannot be checked. role, flag: see `CheckpointRecord`. shape: the model that it should hold,
    for foreign checkpoints that do not describe theirs.

    Raises:
        UsageError: there is no such checkpoint. CorruptError: files are missing, have another size or other content;
        names the checkpoint before it. MismatchError: it has another model, or an unknown version wrote it.
    """
    path = Path(folder)
    is_huggingface = is_hf_folder(path)
    if not is_huggingface:
        path = _find(path, iteration, role=role, flag=flag)
    elif iteration is not None:
        raise UsageError(
            f"{role}: {path} is a Hugging Face folder, without iterations: leave {flag or 'the iteration'} out"
        )
    has_manifest = (path / MANIFEST).exists()
    try:
        manifest = read_manifest(path / MANIFEST, format=FORMAT, version=VERSION) if has_manifest else None
        faults = faults_beside_tensors(manifest) if manifest is not None else []
    except CorruptError as error:
        faults = [str(error)]
    if faults:
        raise damaged(path, faults, role=role, flag=flag, hash_all=False)
    if manifest is None and is_huggingface:
        manifest = describe_folder(path, role)
    elif not is_huggingface:
        check_backends(path)
    if manifest is None:
        warnings.warn(
            f"{role}: {path} has no manifest: it is read as it is, damage would not be seen. "
            f"`megakd verify --adopt {path}` writes one",
            stacklevel=2,
        )
        manifest = describe_foreign(path, role=role, given=shape)
    record = dataclasses.replace(_understand(manifest, path), role=role, flag=flag, checked=has_manifest)
    if shape is not None and (wrong := _differences(record.shape, shape, free={"bf16"})):
        raise MismatchError(f"{role}: {path} holds another model than is asked for: {_both(wrong)}")
    return record


def _find(folder: Path, iteration: int | None, *, role: str, flag: str) -> Path:
    if not folder.is_dir():
        raise UsageError(f"{role}: folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    if iteration is None:
        path = folder if is_checkpoint(folder) else _latest(folder)
        if path is None:
            found = files_of_no_model(folder)
            raise UsageError(f"{role}: {folder} holds no checkpoint ({found or f'{TRACKER} is missing'})")
    else:
        path = checkpoint_path(folder, iteration)
    if not (path / MANIFEST).exists() and not is_checkpoint(path):
        whole = ", ".join(checkpoint.name for checkpoint in _finished(folder)) or "none"
        choose = f" ({flag} N takes another)" if flag else ""
        old = ", but files of Megatron-LM's older form (--ckpt-format torch)" if any(path.glob("mp_rank_*")) else ""
        raise UsageError(f"{role}: {path} has no {MANIFEST}{old}; whole checkpoints there: {whole}{choose}")
    return path


def _latest(folder: Path) -> Path | None:
    tracker, finished = folder / TRACKER, _finished(folder)
    if not tracker.exists():
        return finished[-1] if finished else None
    text = tracker.read_text(errors="replace").strip()
    if text == _RELEASE:
        return folder / _RELEASE
    if not re.fullmatch(r"[0-9]+", text):
        raise CorruptError(
            f"{tracker} holds {text[:40]!r}; expected the number of an iteration; whole checkpoints there: "
            f"{', '.join(path.name for path in finished) or 'none'}: write the number of one into it"
        )
    return checkpoint_path(folder, int(text))


def _finished(folder: Path) -> list[Path]:
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists() or is_checkpoint(path)]


def _iteration(path: Path) -> int:
    return 0 if path.name == _RELEASE else int(path.name.removeprefix("iter_"))


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
        foreign=bool(values.get("foreign", False)),
        rows=int(values["vocab_size"]) if values.get("foreign") and manifest.tokenizer is None else None,
        form=values.get("form", "torch_dist"),
        huggingface=dict(values["huggingface"]) if "huggingface" in values else None,
    )


# keys that may change when a run continues: they do not touch weights or optimizer state
_FREE_KEYS = {
    "transformer_impl", "recompute_granularity", "recompute_method", "recompute_num_layers", "hidden_dropout",
    "attention_dropout", "init_method_std", "moe_token_dispatcher_type", "moe_aux_loss_coeff", "fp8_format",
    "fp8_recipe", "fp8_param_gather", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
    "fp4_format", "first_last_layers_bf16", "make_vocab_size_divisible_by", "padded_vocab_size",
    "max_position_embeddings", "sliding_window",
}  # fmt: skip


def check_resume(
    record: CheckpointRecord, shape: ModelShape, *, vocab_size: int, use_distributed_optimizer: bool
) -> None:
    """Refuse to continue a run with another model than it was started with.

    Raises:
        MismatchError: names every key that differs, with both values.
    """
    differing = _differences(record.shape, shape, free={"bf16"} if record.foreign else set())
    if record.vocab_size != vocab_size:
        differing["vocab_size"] = (record.vocab_size, vocab_size)
    if record.use_distributed_optimizer != use_distributed_optimizer:
        differing["use_distributed_optimizer"] = (record.use_distributed_optimizer, use_distributed_optimizer)
    if differing:
        raise MismatchError(f"{record.path} belongs to another configuration: {_both(differing)}")


def _differences(then: ModelShape, now: ModelShape, *, free: set[str]) -> dict[str, tuple[Any, Any]]:
    old, new = dataclasses.asdict(then), dataclasses.asdict(now)
    return {key: (old[key], new[key]) for key in new if key not in _FREE_KEYS | free and old[key] != new[key]}


def _both(differing: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {old} there, {new} here" for key, (old, new) in differing.items())
