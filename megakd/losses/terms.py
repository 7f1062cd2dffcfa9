"""Comparisons of student and teacher, and the kinds of targets that each is right for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from megakd.errors import UsageError

Tail = Literal["none", "renormalise", "ghost", "spread", "label"]
"""Treatment of the tail, the mass that ``top_p_k`` targets do not list.

none: dropped; the targets sum to less than 1. renormalise: the listed ids are scaled to sum to 1. ghost: all other ids
are one bucket, in both models. spread: shared evenly by all other ids. label: added to the label."""

ALL_TAILS: tuple[Tail, ...] = get_args(Tail)

LEGAL: Mapping[str, Mapping[str, tuple[Tail, ...]]] = MappingProxyType(
    {
        "forward_kl": {"dense": (), "top_p_k": ALL_TAILS, "samples": ("none",), "renormalised_samples": ("none",)},
        "soft_cross_entropy": {
            "dense": (),
            "top_p_k": ALL_TAILS,
            "samples": ("none",),
            "renormalised_samples": ("none",),
        },
        "reverse_kl": {"dense": (), "top_p_k": ("ghost",)},
        "symmetric_kl": {"dense": (), "top_p_k": ("ghost",)},
        "generalised_jsd": {"dense": (), "top_p_k": ("renormalise", "ghost", "label")},
        "skew_forward_kl": {"dense": (), "top_p_k": ("renormalise", "ghost", "label")},
        "skew_reverse_kl": {"dense": (), "top_p_k": ("renormalise", "ghost", "label")},
        "adaptive_kl": {"dense": ()},
        "total_variation": {"dense": (), "top_p_k": ("renormalise", "ghost", "label")},
        "alpha_beta": {"dense": (), "top_p_k": ("ghost",)},
        "logit_mse": {"dense": ()},
        "centred_logit_mse": {"dense": ()},
        "taid": {"dense": ()},
        "decoupled": {"dense": ()},
    }
)
"""Divergence -> kind of targets -> legal tails; every other combination is refused. See ``docs/numerics.md``."""

_WHY = {
    "samples": "sampled counts are unbiased only for losses that are linear in the teacher's probabilities",
    "renormalised_samples": "renormalised samples stand only for losses that are linear in the teacher's probabilities",
    "top_p_k": "it needs the teacher's probability of every id, or of one bucket for all that are not listed",
}


@dataclass(frozen=True)
class KDTerm:
    """A divergence D(p, q) between the teacher's distribution p and the student's q, with its parameters.

    divergence: a key of ``LEGAL``.
    temperature: divides the teacher's logits, and the student's too when ``temperature_on`` is ``"both"``.
    scale_by_temperature_squared: multiply the divergence by temperature², so that its gradient keeps its size (Hinton
        et al., arXiv 1503.02531); only when the temperature is on both.
    tail: treatment of the mass that sparse targets do not list, see ``Tail``.
    reverse_weight: symmetric_kl is (1 - reverse_weight) · forward KL + reverse_weight · reverse KL.
    jsd_beta: weight of the teacher in the mixture of generalised_jsd (GKD, arXiv 2306.13649); 0 is forward KL and 1
        reverse KL.
    skew_alpha: weight, in the mixture of the skew divergences (DistiLLM, arXiv 2402.03898), of the distribution that is
        compared with the mixture; 0: no skew.
    akl_mu: teacher mass of the head in adaptive_kl (arXiv 2404.02657); 1 is forward KL, 0 leaves the best id alone.
    ab_alpha, ab_beta: exponents of teacher and student in alpha_beta (ABKD).
    taid_t: weight of the teacher's logits in the intermediate target of taid (arXiv 2501.16937).
    dkd_alpha, dkd_beta: weights of the label's and the other ids' part in decoupled (DKD, arXiv 2203.08679).
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_on: Literal["teacher", "both"] = "both"
    scale_by_temperature_squared: bool = True
    tail: Tail = "none"
    reverse_weight: float = 0.5
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    akl_mu: float = 0.5
    ab_alpha: float = 0.5
    ab_beta: float = 0.5
    taid_t: float = 0.4
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0

    def __post_init__(self) -> None:
        if self.divergence not in LEGAL:
            raise UsageError(f"divergence {self.divergence!r} is not one of {', '.join(LEGAL)}")
        if self.tail not in ALL_TAILS:
            raise UsageError(f"tail {self.tail!r} is not one of {', '.join(ALL_TAILS)}")
        if self.temperature_on not in ("teacher", "both"):
            raise UsageError(f"temperature_on {self.temperature_on!r} is not one of teacher, both")
        if not 1e-3 <= self.temperature <= 1e3:
            raise UsageError(f"temperature is {self.temperature}, expected 0.001 to 1000")
        for name, most in (("reverse_weight", 1), ("jsd_beta", 1), ("skew_alpha", 0.999), ("akl_mu", 1), ("taid_t", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 to {most}")
        for name in ("dkd_alpha", "dkd_beta"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not (abs(self.ab_alpha) <= 8 and abs(self.ab_beta) <= 8):
            raise UsageError(f"ab_alpha is {self.ab_alpha} and ab_beta {self.ab_beta}, expected -8 to 8")

    @property
    def student_temperature(self) -> float:
        return self.temperature if self.temperature_on == "both" else 1.0

    @property
    def scale(self) -> float:
        """Factor on the divergence."""
        both = self.temperature_on == "both"
        return self.temperature**2 if both and self.scale_by_temperature_squared else 1.0

    @property
    def formula(self) -> str:
        """Name of the formula that is computed: a family at an end point is the divergence that it ends in, and taid is
        forward KL to a target that the sweep makes."""
        ends = {
            "symmetric_kl": (self.reverse_weight, "forward_kl", "reverse_kl"),
            "generalised_jsd": (self.jsd_beta, "forward_kl", "reverse_kl"),
            "skew_forward_kl": (self.skew_alpha, "forward_kl", None),
            "skew_reverse_kl": (self.skew_alpha, "reverse_kl", None),
            "adaptive_kl": (self.akl_mu, None, "forward_kl"),  # all ids are in the head
            "taid": (0.0, "forward_kl", None),
        }
        value, at_0, at_1 = ends.get(self.divergence, (None, None, None))
        if value == 0 and at_0:
            return at_0
        return at_1 if value == 1 and at_1 else self.divergence

    @property
    def needs_label(self) -> bool:
        """True if the label enters the divergence."""
        return self.divergence == "decoupled" or self.tail == "label"

    def check(self, kind: str) -> None:
        """Raise UsageError if this term is wrong for a kind of targets, with the reason and the kinds that are right.

        kind: ``"dense"`` or a ``SparseKind``.
        """
        if kind not in LEGAL["forward_kl"]:
            raise UsageError(f"targets of kind {kind!r}; expected one of {', '.join(LEGAL['forward_kl'])}")
        legal = LEGAL[self.divergence]
        at_end = LEGAL[self.formula] if self.divergence != "taid" else legal
        if kind not in legal or kind not in at_end:
            kinds = ", ".join(k for k in legal if k in at_end)
            raise UsageError(f"divergence {self.divergence} on {kind} targets: {_WHY[kind]}; it takes {kinds}")
        if kind == "dense":
            return
        tails = [tail for tail in legal[kind] if tail in at_end[kind]]
        if self.tail not in tails:
            raise UsageError(
                f"divergence {self.divergence} on {kind} targets with tail {self.tail}: expected {' or '.join(tails)}"
            )
        if self.temperature != 1 and not (kind == "top_p_k" and self.tail == "renormalise"):
            raise UsageError(
                f"temperature {self.temperature} on {kind} targets with tail {self.tail}: what the ids that are not "
                "listed weigh at another temperature is unknown; use temperature 1, or top_p_k with tail renormalise"
            )


def legality_table() -> str:
    """Table of divergences, kinds of targets and tails, as ``--help`` prints it."""
    width = max(map(len, LEGAL)) + 2
    lines = [f"{'divergence':<{width}}sparse targets (dense ones always; tail in brackets)"]
    for divergence, kinds in LEGAL.items():
        sparse = [f"{kind} ({', '.join(tails)})" for kind, tails in kinds.items() if kind != "dense"]
        lines.append(f"{divergence:<{width}}{', '.join(sparse) or '-'}")
    return "\n".join(lines)
