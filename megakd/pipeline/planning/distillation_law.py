"""The distillation scaling law: losses of a student alone and with a teacher (Busbridge et al., arXiv 2502.08606).

    alone       L~ = E + (A / N^alpha + B / D^beta)^gamma
    distilled   L_S = L_T + L_T^-c0 · [1 + (L_T / (L~ · d1))^(1/f1)]^(-c1 f1) · (A' / N^alpha' + B' / D^beta')^gamma'

L: held-out loss, nats a token. N: parameters without embeddings. D: training tokens, infinity allowed. L_T: the
teacher's own loss, the only figure of the teacher that enters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megakd.errors import MismatchError, UsageError

FORMAT, VERSION = "megakd-distillation-law", 1
_TOKENS = np.geomspace(1e6, 1e18, 961)  # where ranges of tokens are looked for


@dataclass(frozen=True)
class SupervisedLaw:
    """Constants of the loss of a model that is trained alone."""

    floor: float
    parameters_scale: float
    tokens_scale: float
    parameters_exponent: float
    tokens_exponent: float
    outer_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Held-out loss after ``tokens`` of training."""
        short = (
            self.parameters_scale / parameters**self.parameters_exponent
            + self.tokens_scale / tokens**self.tokens_exponent
        )
        return float(self.floor + short**self.outer_exponent)


@dataclass(frozen=True)
class DistillationLaw:
    """Constants of the loss of a student that is trained on a teacher's distribution. alone: its law without one.

    parameters_scale ... outer_exponent: A', B', alpha', beta', gamma'. source: where the constants come from.
    """

    alone: SupervisedLaw
    parameters_scale: float
    tokens_scale: float
    parameters_exponent: float
    tokens_exponent: float
    outer_exponent: float
    c0: float
    c1: float
    f1: float
    d1: float
    source: str

    def loss(self, parameters: float, tokens: float, teacher_loss: float) -> float:
        """Held-out loss after ``tokens`` of distillation from a teacher with ``teacher_loss``."""
        short = (
            self.parameters_scale / parameters**self.parameters_exponent
            + self.tokens_scale / tokens**self.tokens_exponent
        )
        ratio = math.log(teacher_loss / (self.alone.loss(parameters, tokens) * self.d1)) / self.f1
        bracket = ratio if ratio > 40 else math.log1p(math.exp(ratio))  # log(1 + e^ratio)
        factor = -self.c0 * math.log(teacher_loss) - self.c1 * self.f1 * bracket
        return float(teacher_loss + math.exp(factor) * short**self.outer_exponent)

    def best_teacher_loss(self, parameters: float, tokens: float) -> float:
        """Loss of the teacher that makes this student best, neither too weak nor too far ahead of it.

        Searched from the floor of the supervised law to twice the student's own loss, to 1e-6.
        """
        low, high = self.alone.floor * 1.001, 2 * self.alone.loss(parameters, tokens)
        losses: list[float] = np.linspace(low, high, 401).tolist()
        distilled = [self.loss(parameters, tokens, loss) for loss in losses]
        best = distilled.index(min(distilled))
        low, high = losses[max(best - 1, 0)], losses[min(best + 1, len(losses) - 1)]
        while high - low > 1e-6:
            left, right = low + (high - low) / 3, high - (high - low) / 3
            if self.loss(parameters, tokens, left) < self.loss(parameters, tokens, right):
                high = right
            else:
                low = left
        return (low + high) / 2

    def winning_range(
        self, parameters: float, teacher_loss: float, alone_tokens: Callable[[float], float] = lambda tokens: tokens
    ) -> tuple[float, float] | None:
        """The range of training tokens in which distilling beats training alone; None if there is none.

        alone_tokens: maps tokens of distillation to the tokens that training alone gets; at equal FLOPs these are more.
        The search goes from 1e6 to 1e18 tokens; a range that reaches an end of it begins at 0 or is infinite. If there
        were several ranges, which is not known to happen, the last is returned.
        """

        def gain(tokens: float) -> float:
            return self.alone.loss(parameters, alone_tokens(tokens)) - self.loss(parameters, tokens, teacher_loss)

        grid: list[float] = _TOKENS.tolist()
        wins = [gain(tokens) > 0 for tokens in grid]
        if not any(wins):
            return None
        last = len(wins) - 1 - wins[::-1].index(True)
        first = next((i + 1 for i in range(last, -1, -1) if not wins[i]), 0)
        low = 0.0 if first == 0 else _crossing(gain, grid[first - 1], grid[first])
        high = math.inf if last == len(wins) - 1 else _crossing(gain, grid[last], grid[last + 1])
        return low, high


PUBLISHED = DistillationLaw(
    SupervisedLaw(1.220, 3355, 18186, 0.408, 0.431, 0.452),
    parameters_scale=2243,
    tokens_scale=24181,
    parameters_exponent=0.321,
    tokens_exponent=0.637,
    outer_exponent=0.764,
    c0=2.549,
    c1=522.6,
    f1=0.090,
    d1=1.315,
    source="as published (arXiv 2502.08606): C4, a vocabulary of 32,000",
)


def law_as_dict(law: DistillationLaw) -> dict[str, Any]:
    """The content of ``distillation_law.json``."""
    return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(law)}


def read_law(path: Path) -> DistillationLaw:
    """Read ``distillation_law.json``. Raises UsageError for a file without a law, MismatchError for another version."""
    try:
        found = orjson.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--distill-law {path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"--distill-law {path}: not JSON: {error}; expected a distillation_law.json") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"--distill-law {path}: no {FORMAT}; expected what --distill-fit wrote")
    if found.get("version") != VERSION:
        raise MismatchError(f"{path}: version {found.get('version')} of {FORMAT}; expected {VERSION}")
    alone = found.get("alone")
    return DistillationLaw(
        alone=SupervisedLaw(**_constants(path, SupervisedLaw, alone if isinstance(alone, dict) else {})),
        source=str(found.get("source", path)),
        **_constants(path, DistillationLaw, found),
    )


def _constants(path: Path, law: type[SupervisedLaw] | type[DistillationLaw], found: Mapping[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(law) if field.type == "float"]
    for name in names:
        value = found.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"--distill-law {path}: {name} is {value!r}; expected a number")
    return {name: float(found[name]) for name in names}


def _crossing(gain: Callable[[float], float], low: float, high: float) -> float:
    """Tokens at which ``gain`` changes its sign, to a relative 1e-6; its signs at ``low`` and ``high`` must differ."""
    sign = gain(low) > 0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        if (gain(middle) > 0) == sign:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
