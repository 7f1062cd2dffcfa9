"""Budget of bad records: the flags that set it, for verbs that drop or damage some of what they read. No torch."""

from __future__ import annotations

from megakd.errors import UsageError


class BadBudgetFlags:
    """Base of a configuration with ``--max-bad-fraction`` and ``--strict``, which declares both options itself."""

    max_bad_fraction: float
    strict: bool

    def check_fraction(self) -> None:
        """Raise UsageError for a fraction that is none."""
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"--max-bad-fraction {self.max_bad_fraction}: expected a fraction from 0 to 1")

    @property
    def bad_budget(self) -> float:
        """Fraction of the records that may be bad."""
        return 0.0 if self.strict else self.max_bad_fraction

    @property
    def allowance(self) -> str:
        """Flag that sets the budget, with its value, for messages."""
        return "--strict" if self.strict else f"--max-bad-fraction {self.max_bad_fraction}"
