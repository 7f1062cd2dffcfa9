"""What the loss of a run can be told, and what is refused of it. No torch."""

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
    kd_alpha: float = option(0.5, "loss = (1 - alpha) * LM + alpha * KD, where there is a teacher", common=True)
    kd_alpha_schedule: Shape = option("constant", "how alpha goes over the run: see the table below", common=True)
    kd_alpha_min: float | None = option(
        None, "the smallest alpha of a schedule, whose largest is --kd-alpha (default: 0)"
    )
    lm_weight: float | None = option(None, "weight of the LM loss beside a teacher (default: 1 - alpha)", common=True)
    kd_divergence: str = option("forward_kl", "how student and teacher are compared: see the table below", common=True)
    kd_temperature: float = option(1.0, "divides the logits before the softmax", common=True)
    kd_temperature_schedule: Shape = option("constant", "how it goes over the run: see the table below")
    kd_temperature_min: float | None = option(
        None, "the smallest temperature of a schedule, whose largest is --kd-temperature (default: 1)"
    )
    kd_temperature_mode: TemperatureMode = option(
        "static",
        "static: one for all tokens; logit_std: times the standard deviation of the token's teacher logits (NormKD); "
        "entropy: from --kd-temperature where the teacher is sure to --kd-temperature-uncertain where it knows nothing",
    )
    kd_temperature_uncertain: float = option(0.5, "entropy: the temperature where all ids are as likely")
    kd_schedule_iters: int | None = option(None, "step at which schedules end; then they stay (default: train-iters)")
    kd_schedule_period: int | None = option(
        None, "steps of one wave of periodic schedules (default: a tenth of the run)"
    )
    kd_temperature_on: Literal["teacher", "both"] = option("both", "whose logits the temperature divides")
    kd_scale_by_temperature_squared: bool = option(
        True, "multiply by the squared temperature where it divides both (Hinton)"
    )
    kd_tail: Tail = option("none", "what becomes of mass that sparse targets do not list")
    kd_reverse_weight: float = option(0.5, "symmetric_kl: weight of reverse KL")
    kd_jsd_beta: float = option(0.5, "generalised_jsd: weight of the teacher in the mixture")
    kd_skew_alpha: float = option(0.1, "skew_*_kl: weight of the own side in the mixture")
    kd_akl_mu: float = option(0.5, "adaptive_kl: teacher's mass of the head")
    kd_ab_alpha: float = option(0.5, "alpha_beta: exponent of the teacher")
    kd_ab_beta: float = option(0.5, "alpha_beta: exponent of the student")
    kd_dkd_alpha: float = option(1.0, "decoupled: weight of the label's part")
    kd_dkd_beta: float = option(8.0, "decoupled: weight of the other ids' part")
    taid_t_start: float = option(0.4, "taid: the teacher's weight in the target at first")
    taid_t_end: float = option(1.0, "taid: the same at the end")
    taid_alpha: float = option(5e-4, "taid: how fast that weight follows a falling loss")
    taid_beta: float = option(0.99, "taid: momentum of the loss's relative change")
    kd_entropy_gate: float = option(
        0.0, "share of each microbatch's tokens, those of lowest teacher entropy, without KD", common=True
    )
    rho_keep: float = option(
        1.0, "share of each microbatch's tokens, those of largest loss above the teacher's, to train on", common=True
    )
    z_loss_coeff: float = option(0.0, "weight of the squared log-sum-exp of the student's logits", common=True)
    loss_implementation: Literal["auto", "native", "triton", "reference"] = option(
        "auto", "code that sweeps the logits"
    )
    head_chunk_mbytes: int = option(256, "memory for logits of one chunk of tokens, MiB")

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
        if self.head_chunk_mbytes < 1:
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
        """What alpha and the temperature are at each step of a run. phases: the learning rate's."""
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
        """Whether a schedule has the phases of a WSD learning rate, whichever that is."""
        return any(shape.startswith("wsd") for shape in (self.kd_alpha_schedule, self.kd_temperature_schedule))

    def kd_term(self) -> KDTerm:
        """The divergence with all it is told. Raises UsageError, in the names of the flags, for what it refuses."""
        names = [field.name for field in fields(KDTerm)]
        told = {name: getattr(self, f"kd_{name}") for name in names if name != "taid_t"}
        try:
            return KDTerm(**told, taid_t=self.taid_t_start)
        except UsageError as error:
            name = re.compile(rf"\b({'|'.join(names)})\b")
            message = name.sub(lambda found: f"--kd-{found[1].replace('_', '-')}", str(error))
            raise UsageError(message) from None
