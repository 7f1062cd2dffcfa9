"""Costs of refining a corpus and training on it: FLOPs, steps at equal FLOPs, bytes, and the share of data to keep.

Everything is counted as in MiniPLM (arXiv 2410.17215): with N parameters a token costs 2N FLOPs forward and 6N in
training, for every model alike. N is the parameters that multiply a token: all matrices of the layers (of experts only
those that see it) and one output projection of vocabulary x width. An input embedding is a lookup and costs nothing;
where it is tied it is the output projection. A size given as a number is taken as N. Attention scores are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megakd.data.indexed.idx_format import HEADER, best_dtype
from megakd.errors import UsageError
from megakd.model.checkpoint.record import read_record
from megakd.model.config import ModelConfig, ModelShape

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
STUDENT_COUNTS = (1, 2, 5, 10, 20)
SCORE_BYTES = 8  # a sample: its sum of log-probs (float32) and the count of its scored tokens (int32)
TOKEN_OUTPUT_BYTES = 2  # a token: its log-prob, or its entropy, in float16
SELECTION_BYTES = 8  # a kept sample: its id
DOCUMENT_BYTES = 4 + 8 + 8 + 8  # a document in the .idx, length, pointer and document index, and in .bytes

# What the paper measured of repeated data: D = 50B tokens, trained on for 50B (its Fig. 5).
_MOST_EPOCHS, _SMALLEST_RATIO, _PLENTY_RATIO = 4.0, 0.25, 0.5


@dataclass(frozen=True)
class ModelSize:
    """Size of a model. parameters: N. attention: FLOPs of attention scores, as a share of 2N; None without a shape.
    projection: the part of N that projects to the vocabulary; 0 without a shape."""

    name: str
    parameters: float
    attention: float | None
    projection: float = 0.0


def model_size(spec: str, *, flag: str, vocab_size: int, seq_length: int) -> ModelSize:
    """The size of a model given as a count of parameters (``200M``, ``1.8e9``), a checkpoint folder or a preset.

    Raises UsageError for anything else.
    """
    number = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)([KMBT]?)", spec.strip(), re.IGNORECASE)
    if number:
        parameters = float(number.group(1)) * _UNITS[number.group(2).upper()]
        if not 1e3 <= parameters < math.inf:
            raise UsageError(f"--{flag} {spec}: {parameters:g} parameters; write 200M or 1.8B for a model of that size")
        return ModelSize(spec, parameters, None)
    if Path(spec).is_dir():
        record = read_record(spec, role=f"--{flag}")
        return ModelSize(Path(spec).name, *_count(record.shape, record.vocab_size, seq_length))
    preset = ModelConfig(preset=spec)
    try:
        preset.validate()
    except UsageError as error:
        known = str(error).split("expected one of ")[-1]
        raise UsageError(
            f"--{flag} {spec}: expected a count of parameters (200M, 1.8B), a checkpoint's folder, or one of {known}"
        ) from None
    return ModelSize(spec, *_count(preset.resolve(flag), vocab_size, seq_length))


def _count(shape: ModelShape, vocab_size: int, seq_length: int) -> tuple[float, float, float]:
    parameters = shape_parameters(shape, vocab_size)
    attention = shape.flops_forward(seq_length=seq_length, vocab_size=vocab_size) / (2 * parameters) - 1
    return parameters, attention, float(shape.hidden_size * vocab_size)


def shape_parameters(shape: ModelShape, vocab_size: int) -> float:
    """N of a shape: the parameters that multiply a token."""
    return shape.flops_per_token_forward / 2 + float(shape.hidden_size * vocab_size)


def vanilla_kd_steps(steps: float, *, student: float, teacher: float) -> float:
    """Steps of online distillation with the FLOPs of ``steps`` without a teacher: T 3N_s / (3N_s + N_t)."""
    return steps * 3 * student / (3 * student + teacher)


def minillm_steps(steps: float, *, student: float, teacher: float) -> float:
    """Steps of MiniLLM (reverse KL by policy gradient) with the FLOPs of ``steps`` alone: T 3N_s / (4N_s + 2N_t)."""
    return steps * 3 * student / (4 * student + 2 * teacher)


@dataclass(frozen=True)
class Refinement:
    """One pass of scoring with its reference model, and the training that follows.

    corpus_tokens: size of D. reference_tokens: size of D_ref, which the reference trains on and no other model sees.
    ratio: the share of D without D_ref that is kept. steps, batch_tokens: training of each student.
    """

    teacher: ModelSize
    reference: ModelSize
    students: tuple[ModelSize, ...]
    corpus_tokens: float
    reference_tokens: float
    ratio: float
    steps: int
    batch_tokens: int
    proxy: ModelSize | None = None
    proxy_fraction: float = 0.02

    @property
    def scored_tokens(self) -> float:
        """Tokens of D without D_ref."""
        return self.corpus_tokens - self.reference_tokens

    @property
    def kept_tokens(self) -> float:
        """Tokens of the selection."""
        return self.ratio * self.scored_tokens

    @property
    def train_tokens(self) -> float:
        """Training tokens of each student."""
        return float(self.steps * self.batch_tokens)

    @property
    def reference_flops(self) -> float:
        """FLOPs of training the reference."""
        return 6 * self.reference.parameters * self.reference_tokens

    def scoring_flops(self, model: ModelSize) -> float:
        """FLOPs of one model that scores the corpus without D_ref."""
        return 2 * model.parameters * self.scored_tokens

    @property
    def offline_flops(self) -> float:
        """FLOPs before any student: train the reference, score with both models. Not in the paper's comparison."""
        return self.reference_flops + self.scoring_flops(self.teacher) + self.scoring_flops(self.reference)

    @property
    def proxy_flops(self) -> float | None:
        """Offline FLOPs if both models score ``proxy_fraction``, and a proxy fitted to that scores everything."""
        if self.proxy is None:
            return None
        both = self.scoring_flops(self.teacher) + self.scoring_flops(self.reference)
        proxy = self.scoring_flops(self.proxy)
        return self.reference_flops + self.proxy_fraction * (both + 3 * proxy) + proxy

    def training_flops(self, student: ModelSize) -> float:
        """FLOPs of training a student, without a teacher beside it."""
        return 6 * student.parameters * self.train_tokens

    @property
    def break_even_runs(self) -> float:
        """Number of students from which the offline work costs less than a teacher beside each of them."""
        return self.offline_flops / (2 * self.teacher.parameters * self.train_tokens)


@dataclass(frozen=True)
class RatioAdvice:
    """Advised share to keep for a training of a given length. regime: plentiful, limited or exhausted data."""

    regime: str
    ratio: float
    epochs: float
    text: str


def epochs(train_tokens: float, scored_tokens: float, ratio: float) -> float:
    """Number of passes that a training makes over the kept tokens."""
    return train_tokens / (ratio * scored_tokens)


def verdict(num_epochs: float) -> str:
    """A remark on a number of epochs over selected data, by the paper's measurements (its Fig. 5: 2, 4 and 8)."""
    if num_epochs <= 1:
        return "nothing comes twice"
    if num_epochs < _MOST_EPOCHS:
        return "fewer epochs than the paper's best where data is short, 4"
    if num_epochs == _MOST_EPOCHS:
        return "the paper's best where data is short"
    return "over-fits: 8 did in the paper" if num_epochs >= 8 else "more epochs than the paper's best, 4"


def advise_ratio(train_tokens: float, scored_tokens: float) -> RatioAdvice:
    """Advise a ratio for a corpus of ``scored_tokens``, by the paper's measurements.

    Two points are known. For a training on half as many tokens as the corpus has, the paper keeps 0.5 and passes over
    it once; for one on as many tokens, 0.25 over 4 epochs was the best of 0.5, 0.25 and 0.125. Between the two the
    ratio falls as 1 / length; for longer trainings it is the one of 4 epochs, at most 1.
    """
    length = train_tokens / scored_tokens
    if length <= _PLENTY_RATIO:
        text = (
            f"Data is plentiful: ratio {_PLENTY_RATIO:g} passes over no sample twice. "
            f"{train_tokens / _PLENTY_RATIO:.3g} tokens are enough to score."
        )
        return RatioAdvice("plentiful", _PLENTY_RATIO, epochs(train_tokens, scored_tokens, _PLENTY_RATIO), text)
    ratio = min(1.0, max(_SMALLEST_RATIO / length, length / _MOST_EPOCHS))
    num_epochs = epochs(train_tokens, scored_tokens, ratio)
    if ratio < 1:
        text = f"Data is short: keep {ratio:.2g} and pass over it {num_epochs:.2g} times."
        return RatioAdvice("limited", ratio, num_epochs, text)
    text = f"Even all of the data is passed over {num_epochs:.2g} times: selection cannot help, more data can."
    return RatioAdvice("exhausted", ratio, num_epochs, text)


@dataclass(frozen=True)
class Storage:
    """Bytes on disk. scores: those of one model. refined: the copy that ``--materialize`` writes, which is optional."""

    corpus: int
    scores: int
    selection: int
    refined: int


def storage(plan: Refinement, *, seq_length: int, vocab_size: int, token_outputs: int) -> Storage:
    """Count bytes on disk. token_outputs: number of values stored for each token (log-prob, entropy) beside scores."""
    token_bytes = best_dtype(vocab_size).itemsize
    samples = int(plan.scored_tokens // seq_length)
    kept = int(plan.ratio * samples)
    return Storage(
        corpus=int(plan.corpus_tokens) * token_bytes,
        scores=samples * (SCORE_BYTES + token_outputs * TOKEN_OUTPUT_BYTES * seq_length),
        selection=kept * SELECTION_BYTES,
        refined=kept * (seq_length * token_bytes + DOCUMENT_BYTES) + HEADER.size + 8,
    )


def gpu_hours(flops: float, tflops_per_gpu: float) -> float:
    """Hours of one GPU with ``tflops_per_gpu`` x 1e12 useful operations a second."""
    return flops / (tflops_per_gpu * 1e12 * 3600)


def amortised(plan: Refinement, student: ModelSize, counts: Sequence[int] = STUDENT_COUNTS) -> list[float]:
    """The offline FLOPs for each student, over those of its training, if ``counts`` students share them."""
    return [plan.offline_flops / (count * plan.training_flops(student)) for count in counts]
