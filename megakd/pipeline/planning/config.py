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
    """What is to be refined and trained. The defaults are MiniPLM's: 100K steps of 512 x 1,024 tokens."""

    student: list[str] = option(
        [], "sizes of the students: parameters (200M, 1.8B), checkpoint folders or presets", common=True
    )
    teacher: str | None = option(None, "size of the teacher", common=True)
    reference: str | None = option(None, "size of the reference model", common=True)
    proxy: str | None = option(None, "size of a proxy scorer, to compare scoring with it", common=True)
    proxy_fraction: float = option(0.02, "share of the corpus that teacher and reference score for the proxy")
    corpus_tokens: float | None = option(
        None,
        "tokens of the corpus, the reference's own included (default: so many that no kept one comes twice)",
        common=True,
    )
    reference_tokens: float = option(5e9, "tokens that the reference is trained on; 0: it is there", common=True)
    ratio: float = option(0.5, "share of the scored samples that is kept", common=True)
    train_iters: int = option(100000, "steps of a student without a teacher beside it", common=True)
    global_batch_size: int = option(512, "samples a step", common=True)
    seq_length: int = option(1024, "tokens a sample", common=True)
    vocab_size: int = option(151936, "of presets, and for the bytes of a stored token", common=True)
    per_token_log_probs: bool = option(False, "log-probs of single tokens are stored too")
    per_token_entropy: bool = option(False, "entropies of single tokens are stored too")
    tflops_per_gpu: float | None = option(
        None, "useful TFLOP/s of one GPU, as `train` prints them: adds GPU-hours", common=True
    )
    num_gpus: int | None = option(None, "GPUs at work: adds days", common=True)

    def validate(self) -> None:
        """Numbers in range, and what belongs together."""
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
        """The sizes looked up. Raises UsageError for one that is unknown."""
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
    """Which points, how to fit them, and where to go on to."""

    fit: list[str] = option(
        [], "curves to fit: [NAME=]PATH[,PATH...], each PATH a run's --save folder or a CSV file", common=True
    )
    fit_points: Literal["all", "last"] = option("all", "of a run: every evaluation, or the last alone", common=True)
    fit_from_tokens: float = option(0.0, "leave out what a run evaluated before so many tokens", common=True)
    extrapolate_tokens: list[float] = option([], "go on to so many training tokens", common=True)
    extrapolate_flops: list[float] = option(
        [], "go on to so many FLOPs (default: 10 times a curve's last)", common=True
    )
    bootstrap: int = option(1000, "redrawn fits for the intervals; 0: none")
    level: float = option(0.95, "of the intervals")
    huber_delta: float = option(1e-3, "log residuals up to here count quadratically, larger ones linearly")
    seed: int = option(1234, "of the redrawing")

    def validate(self) -> None:
        """Numbers in range."""
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
    """The root."""

    cost: CostConfig = group(CostConfig, "costs")
    scaling: FitConfig = group(FitConfig, "scaling law")
    distillation: DistillConfig = group(DistillConfig, "distillation scaling law: is a teacher worth it")
    output: str | None = option(
        None, "folder for plan.md, plan.json, scaling.png and distillation_law.json", common=True
    )

    def validate(self) -> None:
        """Something to do, and somewhere to put it."""
        if not (self.cost.student or self.scaling.fit or self.distillation.distill or self.distillation.distill_fit):
            raise UsageError(
                "nothing to plan: give --student SIZE... --teacher SIZE --reference SIZE, --fit PATH, or "
                "--distill SIZE... --distill-teacher SIZE..."
            )
        if self.output is not None and Path(self.output).exists() and not Path(self.output).is_dir():
            raise UsageError(f"--output {self.output} is a file; expected a folder")
