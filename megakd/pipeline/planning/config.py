"""The flags of ``megakd plan``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.config.tree import group, option
from megakd.errors import UsageError
from megakd.pipeline.planning.costs import ModelSize, Refinement, model_size
from megakd.pipeline.planning.distillation import DistillConfig


@dataclass(frozen=True)
class CostConfig:
    """The corpus to refine and the models to train. The defaults are MiniPLM's: 100K steps of 512 x 1,024 tokens."""

    student: list[str] = option(
        [], "sizes of the students: parameters (200M, 1.8B), checkpoint folders or presets", common=True
    )
    teacher: str | None = option(None, "size of the teacher", common=True)
    reference: str | None = option(None, "size of the reference model", common=True)
    proxy: str | None = option(None, "size of a proxy scorer, to compare scoring with it", common=True)
    proxy_fraction: float = option(0.02, "share of the corpus that teacher and reference score for the proxy")
    corpus_tokens: float | None = option(
        None,
        "tokens of the corpus, the reference's own included (default: enough that no kept token comes twice)",
        common=True,
    )
    reference_tokens: float = option(
        5e9, "tokens that the reference is trained on; 0: it is trained already", common=True
    )
    ratio: float = option(0.5, "share of the scored samples that is kept", common=True)
    train_iters: int = option(100000, "steps of a student without a teacher beside it", common=True)
    global_batch_size: int = option(512, "samples a step", common=True)
    seq_length: int = option(1024, "tokens a sample", common=True)
    vocab_size: int = option(151936, "vocabulary of presets; it also decides the bytes of a stored token", common=True)
    per_token_log_probs: bool = option(False, "log-probs of single tokens are stored as well")
    per_token_entropy: bool = option(False, "entropies of single tokens are stored as well")
    tflops_per_gpu: float | None = option(
        None, "useful TFLOP/s of one GPU, as `train` prints them; adds GPU-hours to the table", common=True
    )
    num_gpus: int | None = option(None, "number of GPUs; adds days to the table", common=True)

    def validate(self) -> None:
        """Raise UsageError for numbers out of range, and for flags that need others."""
        if not self.student:
            for name in ("teacher", "reference", "proxy", "corpus_tokens"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"--{name.replace('_', '-')} without --student SIZE...: there is nothing to plan for"
                    )
            return
        for name in ("teacher", "reference"):
            if getattr(self, name) is None:
                raise UsageError(f"--student without --{name} SIZE: refining takes a teacher and a reference model")
        for name in ("train_iters", "global_batch_size", "seq_length", "vocab_size", "tflops_per_gpu", "num_gpus"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected a positive number")
        if self.num_gpus is not None and self.tflops_per_gpu is None:
            raise UsageError("--num-gpus without --tflops-per-gpu: how fast is one of them?")
        for name in ("ratio", "proxy_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected a share above 0, at most 1"
                )
        if self.reference_tokens < 0:
            raise UsageError(f"--reference-tokens {self.reference_tokens:g}: expected 0 or more")
        if self.corpus_tokens is not None and self.corpus_tokens - self.reference_tokens < self.seq_length:
            raise UsageError(
                f"--corpus-tokens {self.corpus_tokens:g} less --reference-tokens {self.reference_tokens:g}: "
                f"expected at least one sample of {self.seq_length} tokens to score"
            )

    def refinement(self) -> Refinement:
        """Look up the sizes. Raises UsageError for an unknown one."""
        assert self.teacher is not None and self.reference is not None

        def size(spec: str, flag: str) -> ModelSize:
            return model_size(spec, flag=flag, vocab_size=self.vocab_size, seq_length=self.seq_length)

        batch_tokens = self.global_batch_size * self.seq_length
        enough = math.ceil(self.train_iters * batch_tokens / self.ratio) + self.reference_tokens
        return Refinement(
            teacher=size(self.teacher, "teacher"),
            reference=size(self.reference, "reference"),
            students=tuple(size(spec, "student") for spec in self.student),
            corpus_tokens=enough if self.corpus_tokens is None else self.corpus_tokens,
            reference_tokens=self.reference_tokens,
            ratio=self.ratio,
            steps=self.train_iters,
            batch_tokens=batch_tokens,
            proxy=None if self.proxy is None else size(self.proxy, "proxy"),
            proxy_fraction=self.proxy_fraction,
        )


@dataclass(frozen=True)
class FitConfig:
    """The points to fit scaling laws to, settings of the fit, and the computes to extrapolate to."""

    fit: list[str] = option(
        [], "curves to fit: [NAME=]PATH[,PATH...], each PATH a run's --save folder or a CSV file", common=True
    )
    fit_points: Literal["all", "last"] = option(
        "all", "points of a run: every evaluation, or the last alone", common=True
    )
    fit_from_tokens: float = option(0.0, "training tokens before which evaluations are left out", common=True)
    extrapolate_tokens: list[float] = option([], "numbers of training tokens to extrapolate to", common=True)
    extrapolate_flops: list[float] = option(
        [], "numbers of FLOPs to extrapolate to (default: 10 times a curve's last)", common=True
    )
    bootstrap: int = option(1000, "number of redrawn fits for the intervals; 0: no intervals")
    level: float = option(0.95, "confidence level of the intervals")
    huber_delta: float = option(1e-3, "log residual up to which points count quadratically; larger ones count linearly")
    seed: int = option(1234, "seed of the redrawn fits (bootstrap)")

    def validate(self) -> None:
        """Raise UsageError for numbers out of range."""
        if self.bootstrap < 0 or self.seed < 0 or self.fit_from_tokens < 0:
            raise UsageError(
                f"--bootstrap {self.bootstrap}, --seed {self.seed}, --fit-from-tokens {self.fit_from_tokens:g}: "
                "expected 0 or more"
            )
        if not 0 < self.level < 1:
            raise UsageError(f"--level {self.level}: expected a share between 0 and 1, such as 0.95")
        if self.huber_delta <= 0:
            raise UsageError(f"--huber-delta {self.huber_delta}: expected a positive number")
        for name in ("extrapolate_tokens", "extrapolate_flops"):
            flag = f"--{name.replace('_', '-')}"
            if not all(0 < value < math.inf for value in getattr(self, name)):
                raise UsageError(f"{flag} {getattr(self, name)}: expected positive numbers")
            if getattr(self, name) and not self.fit:
                raise UsageError(f"{flag} without --fit PATH: there is no curve to go on with")


@dataclass(frozen=True)
class PlanConfig:
    """All flags of ``megakd plan``."""

    cost: CostConfig = group(CostConfig, "costs")
    scaling: FitConfig = group(FitConfig, "scaling law")
    distillation: DistillConfig = group(DistillConfig, "distillation scaling law: is a teacher worth it")
    output: str | None = option(
        None, "folder for plan.md, plan.json, scaling.png and distillation_law.json", common=True
    )

    def validate(self) -> None:
        """Raise UsageError if there is nothing to plan, or if ``--output`` is a file."""
        if not (self.cost.student or self.scaling.fit or self.distillation.distill or self.distillation.distill_fit):
            raise UsageError(
                "nothing to plan: give --student SIZE... --teacher SIZE --reference SIZE, --fit PATH, or "
                "--distill SIZE... --distill-teacher SIZE..."
            )
        if self.output is not None and Path(self.output).exists() and not Path(self.output).is_dir():
            raise UsageError(f"--output {self.output} is a file; expected a folder")
