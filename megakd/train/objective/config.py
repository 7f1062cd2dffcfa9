"""Options of the loss, and the refusal of values that cannot work. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.losses.terms import KDTerm, Tail
from megakd.train.objective.schedule import KDSchedule, Phases, Shape, make_schedule

TemperatureMode = Literal["static", "logit_std", "entropy"]


@dataclass
class ObjectiveConfig:
    """Options of the loss."""

    kd_alpha: float = option(0.5, "weight of KD beside a teacher: loss = (1 - alpha) * LM + alpha * KD", common=True)
    kd_alpha_schedule: Shape = option("constant", "schedule of alpha over the run: see the table below", common=True)
    kd_alpha_min: float | None = option(None, "smallest alpha of a schedule; the largest is --kd-alpha (default: 0)")
    lm_weight: float | None = option(None, "weight of the LM loss beside a teacher (default: 1 - alpha)", common=True)
    kd_divergence: str = option(
        "forward_kl", "divergence that compares student and teacher: see the table below", common=True
    )
    kd_temperature: float = option(1.0, "temperature, which divides the logits before the softmax", common=True)
    kd_temperature_schedule: Shape = option("constant", "schedule of the temperature over the run: see the table below")
    kd_temperature_min: float | None = option(
        None, "smallest temperature of a schedule; the largest is --kd-temperature (default: 1)"
    )
    kd_temperature_mode: TemperatureMode = option(
        "static",
        "temperature of a token. static: --kd-temperature; logit_std: that times the standard deviation of the token's "
        "teacher logits (NormKD); entropy: from --kd-temperature where the teacher is certain to "
        "--kd-temperature-uncertain where all ids are equally likely",
    )
    kd_temperature_uncertain: float = option(0.5, "entropy: temperature where all ids are equally likely")
    kd_schedule_iters: int | None = option(
        None, "step at which schedules end; later steps keep the last value (default: train-iters)"
    )
    kd_schedule_period: int | None = option(
        None, "steps of one wave of periodic schedules (default: a tenth of the run)"
    )
    kd_temperature_on: Literal["teacher", "both"] = option("both", "logits that the temperature divides")
    kd_scale_by_temperature_squared: bool = option(
        True, "multiply KD by the squared temperature if that divides both (Hinton)"
    )
    kd_tail: Tail = option("none", "treatment of the mass that sparse targets do not list")
    kd_reverse_weight: float = option(0.5, "symmetric_kl: weight of reverse KL")
    kd_jsd_beta: float = option(0.5, "generalised_jsd: weight of the teacher in the mixture")
    kd_skew_alpha: float = option(
        0.1, "skew_*_kl: weight, in the mixture, of the distribution that is compared with it"
    )
    kd_akl_mu: float = option(0.5, "adaptive_kl: teacher's mass in the head of the distribution")
    kd_ab_alpha: float = option(0.5, "alpha_beta: exponent of the teacher")
    kd_ab_beta: float = option(0.5, "alpha_beta: exponent of the student")
    kd_dkd_alpha: float = option(1.0, "decoupled: weight of the label's part")
    kd_dkd_beta: float = option(8.0, "decoupled: weight of the other ids' part")
    taid_t_start: float = option(0.4, "taid: teacher's weight in the target at the first step")
    taid_t_end: float = option(1.0, "taid: teacher's weight in the target at the last step")
    taid_alpha: float = option(5e-4, "taid: speed at which that weight follows a falling loss")
    taid_beta: float = option(0.99, "taid: momentum of the loss's relative change")
    kd_entropy_gate: float = option(
        0.0, "share of each microbatch's tokens that gets no KD: those of lowest teacher entropy", common=True
    )
    rho_keep: float = option(
        1.0,
        "share of each microbatch's tokens that is trained on: those with the largest loss above the teacher's",
        common=True,
    )
    z_loss_coeff: float = option(0.0, "weight of the squared log-sum-exp of the student's logits", common=True)
    loss_implementation: Literal["auto", "native", "triton", "reference"] = option(
        "auto", "implementation of the loss over the vocabulary"
    )
    head_chunk_mbytes: int | None = option(
        None, "memory for the logits of one chunk of tokens, in MiB (default: 256, on a GPU 1024)"
    )

    def validate(self) -> None:
        if not 0 <= self.kd_alpha <= 1:
            raise UsageError(f"--kd-alpha is {self.kd_alpha}; expected 0 <= alpha <= 1")
        if not 0 <= self.taid_t_start <= self.taid_t_end <= 1:
            raise UsageError(
                f"--taid-t-start is {self.taid_t_start} and --taid-t-end {self.taid_t_end}; expected "
                "0 <= start <= end <= 1"
            )
        if not 0 <= self.taid_alpha <= 1:
            raise UsageError(f"--taid-alpha is {self.taid_alpha}; expected 0 to 1")
        if not 0 <= self.taid_beta < 1:
            raise UsageError(f"--taid-beta is {self.taid_beta}; expected 0 <= beta < 1")
        if not 0 <= self.kd_entropy_gate < 1:
            raise UsageError(f"--kd-entropy-gate is {self.kd_entropy_gate}; expected 0 <= share < 1")
        if not 0 < self.rho_keep <= 1:
            raise UsageError(f"--rho-keep is {self.rho_keep}; expected 0 < share <= 1")
        if not self.z_loss_coeff >= 0:
            raise UsageError(f"--z-loss-coeff is {self.z_loss_coeff}; expected 0 or more")
        if self.head_chunk_mbytes is not None and self.head_chunk_mbytes < 1:
            raise UsageError(f"--head-chunk-mbytes is {self.head_chunk_mbytes}; expected at least 1")
        self._check_schedules()
        self.kd_term()

    def _check_schedules(self) -> None:
        for name, shape, low in (
            ("alpha", self.kd_alpha_schedule, self.kd_alpha_min),
            ("temperature", self.kd_temperature_schedule, self.kd_temperature_min),
        ):
            high, least = getattr(self, f"kd_{name}"), 0.0 if name == "alpha" else 1e-3
            if low is not None and shape == "constant":
                raise UsageError(f"--kd-{name}-min {low} is for a schedule: add --kd-{name}-schedule")
            if shape != "constant" and not least <= self._low(name) <= high:
                raise UsageError(
                    f"--kd-{name}-schedule {shape} goes between --kd-{name} {high} and --kd-{name}-min "
                    f"{self._low(name)}; expected {least:g} <= min <= {name}"
                )
        if self.lm_weight is not None and not self.lm_weight >= 0:
            raise UsageError(f"--lm-weight is {self.lm_weight}; expected 0 or more")
        if self.lm_weight == 0 and self.kd_alpha_schedule != "constant" and self._low("alpha") == 0:
            raise UsageError(
                f"--lm-weight 0 with --kd-alpha-schedule {self.kd_alpha_schedule}: where alpha is 0 "
                "there is nothing to train on; set --kd-alpha-min above 0"
            )
        for name, smallest in (("kd_schedule_iters", 1), ("kd_schedule_period", 2)):
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected {smallest} or more")
        if self.kd_temperature_mode == "static":
            return
        mode = f"--kd-temperature-mode {self.kd_temperature_mode}"
        if self.kd_temperature_on != "teacher":
            raise UsageError(
                f"{mode} gives each token a temperature of the teacher's logits alone: add --kd-temperature-on teacher"
            )
        if self.kd_divergence == "taid":
            raise UsageError(
                f"{mode} with --kd-divergence taid, whose target mixes logits of one temperature: use static"
            )
        if not 1e-3 <= self.kd_temperature_uncertain <= 1e3:
            raise UsageError(f"--kd-temperature-uncertain is {self.kd_temperature_uncertain}; expected 0.001 to 1000")

    def _low(self, name: str) -> float:
        low: float | None = getattr(self, f"kd_{name}_min")
        return low if low is not None else (0.0 if name == "alpha" else 1.0)

    def schedule(self, train_iters: int, phases: Phases) -> KDSchedule:
        """Return alpha and the temperature as functions of the step. phases: of the learning rate."""
        make = partial(
            make_schedule,
            end=self.kd_schedule_iters or train_iters,
            period=self.kd_schedule_period or max(2, train_iters // 10),
            phases=phases,
        )
        return KDSchedule(
            alpha=make(self.kd_alpha_schedule, self.kd_alpha, self._low("alpha")),
            temperature=make(self.kd_temperature_schedule, self.kd_temperature, self._low("temperature")),
            lm_weight=self.lm_weight,
        )

    @property
    def has_phases(self) -> bool:
        """True if a schedule has the phases of a WSD learning rate, whatever style the learning rate has."""
        return any(shape.startswith("wsd") for shape in (self.kd_alpha_schedule, self.kd_temperature_schedule))

    def kd_term(self) -> KDTerm:
        """Return the divergence with its parameters. Raises UsageError, in the names of the flags, for wrong ones."""
        names = [field.name for field in fields(KDTerm)]
        values = {name: getattr(self, f"kd_{name}") for name in names if name != "taid_t"}
        try:
            return KDTerm(**values, taid_t=self.taid_t_start)
        except UsageError as error:
            name = re.compile(rf"\b({'|'.join(names)})\b")
            message = name.sub(lambda match: f"--kd-{match[1].replace('_', '-')}", str(error))
            raise UsageError(message) from None
