"""Refusal of options that were given and would do nothing; as defaults they are ignored silently."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megakd.errors import UsageError

if TYPE_CHECKING:
    from megakd.train.config import TrainingConfig
    from megakd.train.objective.config import ObjectiveConfig
    from megakd.train.teacher_config import TeacherConfig

_OF_A_MODEL = ("iteration", "transformer_impl", "bf16", "fp8_format", "fp8_recipe")
_OF_DIVERGENCES = {
    "kd_reverse_weight": ("symmetric_kl",), "kd_jsd_beta": ("generalised_jsd",),
    "kd_skew_alpha": ("skew_forward_kl", "skew_reverse_kl"), "kd_akl_mu": ("adaptive_kl",),
    "kd_ab_alpha": ("alpha_beta",), "kd_ab_beta": ("alpha_beta",),
    "kd_dkd_alpha": ("decoupled",), "kd_dkd_beta": ("decoupled",),
    "taid_t_start": ("taid",), "taid_t_end": ("taid",), "taid_alpha": ("taid",), "taid_beta": ("taid",),
}  # fmt: skip
_OF_STORES = ("logits_load_decode_threads", "logits_load_prefetch_depth")


def check_given(
    training: TrainingConfig, teacher: TeacherConfig, objective: ObjectiveConfig, given: frozenset[str]
) -> None:
    """Refuse options of distillation without a teacher, parameters of another divergence, and a length given twice.

    given: places in the tree of the options that flags and files set. ``--kd-alpha 0`` itself says that nothing is
    distilled, so that no teacher is needed beside it.
    """
    if {"training.train_iters", "training.train_samples"} <= given and training.train_samples is not None:
        comes_to = training.batch_sizes.train_iters(training.train_samples)
        if training.train_iters != comes_to:
            raise UsageError(
                f"--train-iters {training.train_iters} and --train-samples {training.train_samples} ({comes_to} steps) "
                "say one thing twice: drop one"
            )
    without_kd = "objective.kd_alpha" in given and objective.kd_alpha == 0
    distils = re.compile(r"objective\.((?:kd|taid)_.*|lm_weight)")
    asked = [] if without_kd else sorted(match[1] for key in given if (match := distils.fullmatch(key)))
    if asked and not teacher.is_there:
        raise UsageError(
            f"{_flags(asked)} without a teacher: the run would train on the LM loss alone. Add --teacher-load DIR or "
            f"--logits-load-dir DIR, or drop {'it' if len(asked) == 1 else 'them'}"
        )
    chosen = objective.kd_divergence
    for name, divergences in _OF_DIVERGENCES.items():
        if f"objective.{name}" in given and chosen not in divergences:
            raise UsageError(
                f"{_flags([name])} is a parameter of {' and '.join(divergences)}, and --kd-divergence is {chosen}: "
                f"choose --kd-divergence {divergences[0]}, or drop it"
            )
    asked = [name for name in _OF_A_MODEL if f"teacher.{name}" in given]
    if asked and teacher.load is None:
        raise UsageError(f"{_flags(asked, 'teacher-')} without a model as teacher: add --teacher-load DIR")
    asked = [name for name in _OF_STORES if f"teacher.{name}" in given]
    if asked and not teacher.reads_stores:
        raise UsageError(f"{_flags(asked)} without a store: add --logits-load-dir DIR")


def _flags(names: list[str], prefix: str = "") -> str:
    return ", ".join(f"--{prefix}{name.replace('_', '-')}" for name in names)
