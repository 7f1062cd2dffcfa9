"""State of a run between two steps, beside its weights: its place in the data and its random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakd.data.loader import Loader
from megakd.parallel import Groups, random_states, set_random_states


@dataclass(frozen=True)
class Standing:
    """State that even a refused step changes; it is put back before a checkpoint of the step before is saved."""

    batches: Loader
    consumed_samples: int
    random: dict[str, Any]

    @classmethod
    def of(cls, batches: Loader, groups: Groups) -> Standing:
        """Return the run's current state."""
        return cls(batches, batches.consumed_samples, random_states(groups))

    def restore(self) -> None:
        """Put the run back into this state."""
        self.batches.rewind(self.consumed_samples)
        set_random_states(self.random)
