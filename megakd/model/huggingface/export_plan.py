"""Plan of an export: what a Hugging Face folder of a checkpoint will hold, or why there can be none. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megakd.data.tokenizers.base import TokenizerType
from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.config import ModelShape
from megakd.model.huggingface.config_json import CONFIG, understand_config
from megakd.model.huggingface.config_writer import check_shape, choose_family, config_of, generation_config_of
from megakd.model.huggingface.families.table import Family, HfTensor
from megakd.model.huggingface.folder import EMBEDDING, HEAD
from megakd.model.huggingface.tokenizer_files import (
    TokenizerFiles,
    doubt_of_tokenizer,
    find_tokenizer_files,
)

ExportDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExportPlan:
    """Content of a folder that will be written: the family's tensors, the tokenizer's files, the configuration.

    rows: of the embedding there. dtype: of all tensors; None as they are stored. exact: refuse weights that ``dtype``
    cannot hold without loss. recorded: the configuration of the
    folder that the model was imported from, and its generation configuration; None for a model that was trained here.
    """

    record: CheckpointRecord
    family: Family
    rows: int
    dtype: ExportDtype | None
    exact: bool
    max_position_embeddings: int
    tokenizer: TokenizerFiles
    recorded: Mapping[str, Any]

    def tensors(self) -> Iterator[HfTensor]:
        """Yield every tensor of the folder. A head that is the embedding is there only if the model came with it."""
        for tensor in self.family.tensors(self.record.shape, self.rows):
            yield tensor
            if tensor.theirs == EMBEDDING and self.record.shape.tied and self.recorded.get("head_is_stored"):
                yield replace(tensor, theirs=HEAD)

    @property
    def doubt(self) -> str | None:
        """Warning about how transformers reads the tokenizer's files; None without."""
        return doubt_of_tokenizer(self.tokenizer, self.family.model_type)

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the content of ``config.json``. dtype: of the weights, as in ``bfloat16``."""
        return _config(self.record.shape, self, dtype, (self.tokenizer.record or {}).get("eod"))

    def generation_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``generation_config.json``. config: that of ``config.json``."""
        return generation_config_of(config, self.recorded.get("generation_config"))


def plan_export(
    record: CheckpointRecord,
    *,
    tokenizer_type: TokenizerType | None = None,
    tokenizer_model: str | None = None,
    tokenizer_files: bool = True,
    vocab_size: int | None = None,
    max_position_embeddings: int | None = None,
    dtype: ExportDtype | None = None,
) -> ExportPlan:
    """Return the plan of the export of ``record``.

    vocab_size: the true vocabulary of a checkpoint that records none, such as Megatron-LM's. max_position_embeddings:
    longest sequence, in tokens; None for what the model or its training says.

    Raises:
        MismatchError: no family can hold the model, or the tokenizer is another one; names field and value.
        UsageError: the vocabulary or the longest sequence is not known, or the tokenizer's files are not there.
    """
    shape, what = record.shape, f"{record.role} {record.path}"
    if record.form == "huggingface":
        raise UsageError(f"{what} is a Hugging Face folder already: an export is made of a checkpoint")
    recorded = record.huggingface or {}
    told = recorded.get("config", {}).get("max_position_embeddings")
    length = max_position_embeddings or shape.max_position_embeddings or told or record.seq_length
    if not length:
        raise UsageError(f"{what} does not tell the longest sequence of its model: add --max-position-embeddings N")
    tokenizer = TokenizerFiles(record.tokenizer, note="left out by --no-tokenizer-files")
    if tokenizer_files:
        tokenizer = find_tokenizer_files(
            record.tokenizer,
            tokenizer_type=tokenizer_type,
            tokenizer_model=tokenizer_model,
            max_length=length,
            what=what,
            or_else=", --no-tokenizer-files exports the weights without it",
        )
    was_half = record.foreign and _dtype(recorded) == "float16" and not shape.bf16  # stored as float32, without loss
    plan = ExportPlan(
        record=record,
        family=choose_family(shape, recorded.get("config", {}).get("model_type"), what),
        rows=_rows(record, tokenizer, vocab_size),
        dtype="float16" if dtype is None and was_half else dtype,
        exact=dtype is None,
        max_position_embeddings=length,
        tokenizer=tokenizer,
        recorded=recorded,
    )
    check_config(plan.config(plan.dtype or "float32"), shape, what)
    return plan


def check_exportable(
    shape: ModelShape,
    tokenizer: Mapping[str, Any] | None,
    recorded: Mapping[str, Any] | None,
    *,
    seq_length: int,
    tokenizer_type: TokenizerType | None,
    tokenizer_model: str | None,
    what: str,
) -> str | None:
    """Refuse a model whose checkpoints could not be exported, before there is one; return a warning if there is any.

    recorded: ``huggingface`` of the checkpoint that its weights come from; None for others.

    Raises:
        MismatchError, UsageError: as `plan_export`.
    """
    length = shape.max_position_embeddings or seq_length
    config_before = (recorded or {}).get("config", {})
    files = find_tokenizer_files(
        tokenizer, tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, max_length=length, what=what
    )
    family = choose_family(shape, config_before.get("model_type"), what)
    config = config_of(
        shape,
        family,
        rows=1,
        dtype="float32",
        max_position_embeddings=length,
        eos_token_id=None,
        recorded=config_before or None,
    )
    check_config(config, shape, what)
    return doubt_of_tokenizer(files, family.model_type)


def check_config(config: Mapping[str, Any], shape: ModelShape, what: str) -> None:
    """Refuse the content of a ``config.json`` that is read as another model than ``shape``. Raises MismatchError."""
    check_shape(shape, understand_config(config, Path(CONFIG), what).shape, what)


def _config(shape: ModelShape, plan: ExportPlan, dtype: str, eod: int | None) -> dict[str, Any]:
    return config_of(
        shape,
        plan.family,
        rows=plan.rows,
        dtype=dtype,
        max_position_embeddings=plan.max_position_embeddings,
        eos_token_id=eod,
        recorded=plan.recorded.get("config"),
    )


def _dtype(recorded: Mapping[str, Any]) -> str:
    """Return the type of the weights in the folder that the model was imported from, "" without."""
    config = recorded.get("config", {})
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _rows(record: CheckpointRecord, tokenizer: TokenizerFiles, vocab_size: int | None) -> int:
    """Return the rows of the exported embedding: those of the folder that it came from, else the true vocabulary."""
    what = f"{record.role} {record.path}"
    known = None if record.rows is not None and record.huggingface is None else record.vocab_size
    if known is not None and vocab_size not in (None, known):
        raise MismatchError(f"--vocab-size {vocab_size}, and {what} records {known}: leave the flag out")
    if known is None:
        known = vocab_size or (tokenizer.record or {}).get("vocab_size")
    if known is None:
        raise UsageError(
            f"{what} has an embedding of {record.rows} rows, and does not tell how many of them are padding: add "
            "--tokenizer-type and --tokenizer-model, or --vocab-size N"
        )
    if record.rows is not None and known > record.rows:
        raise MismatchError(f"{what} has an embedding of {record.rows} rows, fewer than the vocabulary of {known}")
    return max(known, record.shape.padded_vocab_size or 0)
