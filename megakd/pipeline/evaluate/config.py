"""Flags of ``megakd evaluate``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.data.samples.packing import Packing
from megakd.data.samples.split import Split
from megakd.errors import UsageError
from megakd.pipeline.frozen.config import FrozenModelConfig


@dataclass(frozen=True)
class AskedConfig:
    """Model, held-out data, tasks and requests of an evaluation, and the places of its results."""

    load: str = option(
        ..., "the model: a folder of checkpoints of 'megakd train', or a Hugging Face folder", common=True
    )
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)", common=True)
    data_path: list[str | float] = option(
        [], "held-out data: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..., without .bin or .idx", common=True
    )
    valid_data_path: list[str | float] = option([], "another name of --data-path, as training has it")
    packing: Packing = option(
        "concat",
        "cut of the samples: windows of the token stream (concat), windows cut back to a sentence end (sentence), or "
        "documents",
        common=True,
    )
    split: str | None = option(
        None,
        "shares of training, held-out and test documents of --data-path, such as 969,30,1, as training has it: the "
        "second part is evaluated (default: all of it)",
    )
    seq_length: int | None = option(
        None,
        "tokens of one sample of the held-out data, and the longest context of a task (default: as the model records)",
        common=True,
    )
    eval_samples: int | None = option(
        None,
        "samples of the held-out data to take, from the beginning of the order of training's own evaluation "
        "(default: every sample once)",
        common=True,
    )
    eod_mask_loss: bool = option(
        False, "leave out the first token of every document, as the same flag of training does"
    )
    teacher_load: str | None = option(
        None, "model to compare with: agreement, KL divergence and its own loss on the held-out data", common=True
    )
    teacher_iteration: int | None = option(None, "iteration of the checkpoint in --teacher-load (default: the latest)")
    tasks: list[str] = option(
        [],
        "tasks or groups of lm-eval, such as hellaswag,arc_easy; 'miniplm' is the group of nine that MiniPLM reports",
        common=True,
    )
    include_path: list[str] = option([], "folders with further task files of lm-eval (YAML)")
    num_fewshot: int | None = option(None, "examples in a task's context (default: as the task says, else 0)")
    limit: float | None = option(None, "documents of each task, or a share of them below 1, for a trial", common=True)
    requests: list[str] = option(
        [],
        "files of ready requests, in JSON lines with context, continuation, doc_id, idx and label (.jsonl or "
        ".jsonl.gz): multiple choice without lm-eval and without a hub",
        common=True,
    )
    add_bos_token: bool | None = option(
        None, "begin a task's context with the begin-of-text token (default: as the tokenizer's own template does)"
    )
    prefix_token_id: int | None = option(
        None, "token before a text without context (default: begin of text, else end of document)"
    )
    bootstrap_iters: int = option(
        1000, "resamplings for standard errors of metrics that have no formula, such as perplexity"
    )
    log_samples: bool = option(False, "write each document's log-likelihoods beside the results")
    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"] | None
    ) = option(None, "type of the model's tokenizer, where the checkpoint records none")
    output: str | None = option(None, "folder for the results (default: 'evaluate' in --load)", common=True)
    tensorboard_dir: str | None = option(
        None, "folder for TensorBoard (default: that of the training run in --load, if it has one)"
    )


@dataclass(frozen=True)
class EvaluateConfig(FrozenModelConfig, AskedConfig):
    """Flags of ``megakd evaluate``."""

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        super().validate()
        if self.data_path and self.valid_data_path:
            raise UsageError("--data-path and --valid-data-path are one flag here: give one of them")
        if not (self.held_out_path or self.task_names or self.requests):
            raise UsageError(
                "nothing to evaluate: give --data-path PREFIX (held-out data), --tasks NAMES (lm-eval) or --requests "
                "FILES, or several of them"
            )
        for name, least in (("seq_length", 1), ("eval_samples", 1), ("num_fewshot", 0), ("prefix_token_id", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
        if self.bootstrap_iters < 0:
            raise UsageError(f"--bootstrap-iters is {self.bootstrap_iters}; expected 0 (none) or more")
        if self.limit is not None and not self.limit > 0:
            raise UsageError(f"--limit is {self.limit}; expected a number of documents, or a share below 1")
        self._refuse_idle_flags()
        if self.seq_length is not None:
            self.check_seq_length(self.seq_length)
        if self.split is not None and not Split(self.split).shares[1]:
            raise UsageError(
                f"--split {self.split} leaves no document to evaluate on; expected a share for held-out ones"
            )

    @property
    def held_out_path(self) -> list[str]:
        """Parts of ``--data-path``, as words; empty without held-out data."""
        return [str(part) for part in self.data_path or self.valid_data_path]

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, which may be separated by commas or spaces."""
        return [name for part in self.tasks for name in part.split(",") if name]

    @property
    def scores_text(self) -> bool:
        """True if text is scored, for which the model's tokenizer is needed."""
        return bool(self.task_names or self.requests)

    def _refuse_idle_flags(self) -> None:
        if not self.held_out_path:
            for name in ("eval_samples", "teacher_load", "split"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} is for held-out data: add --data-path PREFIX")
            if self.eod_mask_loss:
                raise UsageError("--eod-mask-loss is for held-out data: add --data-path PREFIX")
        if self.teacher_load is None and self.teacher_iteration is not None:
            raise UsageError(f"--teacher-iteration {self.teacher_iteration} without --teacher-load")
        if not self.task_names:
            for name in ("include_path", "num_fewshot"):
                if getattr(self, name) not in (None, []):
                    raise UsageError(f"--{name.replace('_', '-')} is for tasks: add --tasks NAMES")
        if not self.scores_text:
            for name in ("limit", "add_bos_token", "prefix_token_id"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} is for tasks and requests: add --tasks or --requests")
            if self.log_samples:
                raise UsageError("--log-samples is for tasks and requests: add --tasks or --requests")
