"""Flags of the verbs that run a frozen model: those of the model, and those of the samples it sees. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.data.samples.packing import Packing
from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.model.checkpoint.foreign import read_shape
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.config import ModelShape


@dataclass(frozen=True)
class SampleConfig:
    """Samples that the model sees."""

    data_path: str = option(..., "the dataset: PREFIX, without .bin or .idx", common=True)
    seq_length: int = option(..., "tokens of one sample", common=True)
    packing: Packing = option(
        "concat",
        "cut of the samples: windows of the token stream (concat), windows cut back to a sentence end "
        "(sentence), or documents",
        common=True,
    )


@dataclass(frozen=True)
class FrozenModelConfig:
    """Layout and precision of the model, and the interval of progress lines."""

    micro_batch_size: int = option(4, "samples that go through the model together", common=True)
    tensor_model_parallel_size: int = option(1, "ranks that share one layer (TP)", common=True)
    pipeline_model_parallel_size: int = option(1, "pipeline stages (PP)", common=True)
    sequence_parallel: bool = option(False, "split activations between layers along the sequence too")
    distributed_timeout_minutes: float = option(10.0, "minutes after which a waiting collective is an error")
    vocab_size: int | None = option(
        None, "number of token ids (default: the tokenizer's); the model's rows beyond it are padding"
    )
    tokenizer_model: str | None = option(
        None,
        "file or folder of the tokenizer of dataset and model, if it has moved; needed for a sentence packing that is "
        "not written yet",
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "implementation of the model's layers"
    )
    bf16: bool | None = option(None, "run the model in bfloat16 (default: as it was trained)", common=True)
    fp8_format: Literal["e4m3", "hybrid"] | None = option(None, "FP8 format to run the model in (Transformer Engine)")
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = option("tensorwise", "recipe of FP8 scaling")
    loss_implementation: Literal["auto", "native", "triton", "reference"] = option(
        "auto", "code that passes over the logits"
    )
    head_chunk_mbytes: int = option(128, "memory for the logits of one chunk of tokens, in MiB")
    model_config: str | None = option(
        None,
        "YAML that describes the model, as in the student's part of a training run, for a checkpoint that does not "
        "(plain megatron-core)",
    )
    log_interval: float = option(10.0, "seconds between progress lines", common=True)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("micro_batch_size", "head_chunk_mbytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if self.log_interval < 0:
            raise UsageError(f"--log-interval is {self.log_interval}; expected 0 or more")
        self.parallel().validate()

    def check_seq_length(self, seq_length: int) -> None:
        """Raise UsageError for a length of samples that is not positive, or does not divide over tensor ranks."""
        if seq_length < 1:
            raise UsageError(f"--seq-length is {seq_length}; expected at least 1")
        if self.sequence_parallel and seq_length % self.tensor_model_parallel_size:
            raise UsageError(
                f"--seq-length {seq_length} is not a multiple of --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size}, which --sequence-parallel needs"
            )

    def parallel(self) -> ParallelConfig:
        """The model's layout."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
            distributed_timeout_minutes=self.distributed_timeout_minutes,
        )

    def described_shape(self) -> ModelShape | None:
        """Shape that ``--model-config`` describes; None without the flag."""
        return None if self.model_config is None else read_shape(self.model_config, "--model-config")

    def shape_of(self, record: CheckpointRecord, seq_length: int) -> ModelShape:
        """Shape of a checkpoint's model with the layers and the precision that the flags ask for, without dropout.

        Raises UsageError for a model that sees sequences of ``seq_length`` tokens through a sliding window.
        """
        record.shape.check_sequence(seq_length, f"{record.role} {record.path}")
        record.shape.warn_of_length(seq_length, f"{record.role} {record.path}")
        return record.shape.frozen(
            transformer_impl=self.transformer_impl,
            bf16=record.shape.bf16 if self.bf16 is None else self.bf16,
            fp8_format=self.fp8_format,
            fp8_recipe=self.fp8_recipe,
        )


@dataclass(frozen=True)
class FrozenConfig(FrozenModelConfig, SampleConfig):
    """Samples, layout and precision of the model, and the interval of progress lines."""

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        super().validate()
        self.check_seq_length(self.seq_length)

    def frozen_shape(self, record: CheckpointRecord) -> ModelShape:
        """Shape of a checkpoint's model for these samples, as `shape_of` returns it."""
        return self.shape_of(record, self.seq_length)


def precision(shape: ModelShape) -> str:
    """Precision of a model, for manifests: ``fp32``, ``bf16``, or ``bf16 fp8-e4m3-blockwise``."""
    wide = "bf16" if shape.bf16 else "fp32"
    return f"{wide} fp8-{shape.fp8_format}-{shape.fp8_recipe}" if shape.fp8_format else wide
