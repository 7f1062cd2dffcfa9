"""Options of the teacher: a model, logits stores, or both. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.model.checkpoint.foreign import read_shape
from megakd.model.config import ModelShape
from megakd.train.stored_targets import WITHOUT


@dataclass
class TeacherConfig:
    """Options of the teacher."""

    load: str | None = option(
        None,
        "folder of the teacher's checkpoint, or a Hugging Face folder; either also describes its model",
        common=True,
    )
    iteration: int | None = option(None, "iteration of the checkpoint in that folder (default: the latest)")
    model_config: str | None = option(
        None,
        "YAML file that describes the model if the checkpoint does not (plain megatron-core): keys as for the student",
    )
    tensor_model_parallel_size: int | None = option(None, "TP of the teacher (default: the student's)", common=True)
    pipeline_model_parallel_size: int | None = option(None, "PP of the teacher (default: the student's)", common=True)
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "layers of the teacher: as for the student"
    )
    bf16: bool | None = option(None, "run the teacher in bfloat16 (default: like the student)")
    fp8_format: Literal["e4m3", "hybrid"] | None = option(None, "run the teacher in FP8 (Transformer Engine)")
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = option("tensorwise", "FP8 scaling of the teacher")
    logits_load_dir: list[str] = option(
        [],
        "logits stores with the targets: a folder of 'megakd capture' for each dataset of --data-path, or 'none'; "
        "data without stored targets asks --teacher-load, or trains on the LM loss alone",
        common=True,
        flag="--logits-load-dir",
    )
    valid_logits_load_dir: list[str] = option(
        [], "logits stores of the held-out data, in the form of --logits-load-dir", flag="--valid-logits-load-dir"
    )
    logits_load_decode_threads: int = option(
        1, "threads of a rank that read and decode stored targets", flag="--logits-load-decode-threads"
    )
    logits_load_prefetch_depth: int = option(
        2, "microbatches whose stored targets are read ahead", flag="--logits-load-prefetch-depth"
    )

    def shape(self) -> ModelShape | None:
        """Return the model that ``model_config`` describes; None without it."""
        return None if self.model_config is None else read_shape(self.model_config, "--teacher-model-config")

    @property
    def reads_stores(self) -> bool:
        """True if any of the training data has stored targets."""
        return any(folder != WITHOUT for folder in self.logits_load_dir)

    @property
    def is_there(self) -> bool:
        """True if there is anything to distil from."""
        return self.load is not None or self.reads_stores

    def validate(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                flag = f"--teacher-{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}; expected at least 1")
        if self.load is None and (self.tensor_model_parallel_size or self.pipeline_model_parallel_size):
            raise UsageError("a layout for the teacher is given but no teacher: add --teacher-load DIR")
        if self.load is None and self.model_config is not None:
            raise UsageError("--teacher-model-config describes the model of --teacher-load DIR, which is not given")
        for name, least in (("logits_load_decode_threads", 1), ("logits_load_prefetch_depth", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected {least} or more")
        if self.logits_load_dir and not self.reads_stores:
            raise UsageError(f"--logits-load-dir names '{WITHOUT}' for every dataset: drop it")
        if self.valid_logits_load_dir and not self.is_there:
            raise UsageError("--valid-logits-load-dir without a teacher: add --logits-load-dir or --teacher-load")
