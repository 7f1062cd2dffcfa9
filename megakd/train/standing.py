"""Where a run stands between two steps, beside its weights: its place in the data, and its random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakd.data.loader import Loader
from megakd.parallel import Groups, random_states, set_random_states


@dataclass(frozen=True)
class Standing:
    """What a step changes though it is refused in the end. It can be put back, for a checkpoint of the step before."""

    batches: Loader
    consumed_samples: int
    random: dict[str, Any]

    @classmethod
    def of(cls, batches: Loader, groups: Groups) -> Standing:
        """Where the run stands now."""
        return cls(batches, batches.consumed_samples, random_states(groups))

    def restore(self) -> None:
        """Put the run back to where it stood then."""
        self.batches.rewind(self.consumed_samples)
        set_random_states(self.random)
