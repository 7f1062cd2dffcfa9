"""How far work on ranges has come: over all ranks and jobs that write to one folder, as their committed ranges tell."""

from __future__ import annotations

import time
from collections.abc import Callable

from megakd.work.console import tell


class RangeProgress:
    """Lines on stderr with the rate in tokens a second and the time that is left.

    samples_done: how many samples are committed, by whomever. interval: seconds between two lines. done: what is done
    with a sample, as "scored".
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seq_length: int,
        samples_done: Callable[[], int],
        interval: float,
        done: str = "scored",
    ) -> None:
        self._num_samples, self._seq_length, self._interval = num_samples, seq_length, interval
        self._samples_done, self._done = samples_done, done
        self._first = samples_done()
        self._started = self._shown = time.monotonic()
        if self._first:
            tell(f"continuing: {self._first} of {num_samples} samples are {done}")

    def tick(self, under_way: int) -> None:
        """Print a line if it is time. under_way: samples that this process has done and not yet committed."""
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            done = min(self._samples_done() + under_way, self._num_samples)
            fresh, seconds = done - self._first, now - self._started
            text = progress_line(done, self._num_samples, fresh, self._seq_length, seconds, what=self._done)
            tell(text)


def progress_line(
    done: int, num_samples: int, fresh: int, seq_length: int, seconds: float, *, what: str = "scored"
) -> str:
    """Share and, from the ``fresh`` samples of the last ``seconds``, the rate and the time that is left."""
    text = f"{what} {done} of {num_samples} samples ({100 * done / num_samples:.1f} %"
    if fresh <= 0 or seconds <= 0:
        return f"{text})"
    left = round((num_samples - done) * seconds / fresh)
    rate = fresh * seq_length / seconds
    return f"{text}, {rate:.0f} tokens/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left)"
