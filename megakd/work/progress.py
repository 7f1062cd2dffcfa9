"""Progress of long work: lines on stderr with rates and the time that is left, or a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megakd.work.console import tell

_LINE_SECONDS, _SILENT_SECONDS = 1.0, 5.0


class Progress:
    """Clock of long work: when the next line is due, how fast the work is, how long the rest takes.

    total: amount of work in all, in any unit. done: amount that was done before this process began.
    interval: seconds between two lines. bar: unit of a bar that takes their place where stderr is a terminal.
    """

    def __init__(self, total: float, *, done: float, interval: float, bar: str | None = None) -> None:
        self.total, self.done, self._done_before = total, done, done
        self._interval = interval
        self._started = self._shown = time.monotonic()
        self._bar = None
        if bar is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=bar, unit_scale=True, mininterval=0.3)

    @property
    def seconds(self) -> float:
        """Seconds since the work began in this process."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def fresh(self) -> float:
        """Amount of work that this process saw done."""
        return self.done - self._done_before

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate so far; None before there is a rate."""
        return (self.total - self.done) * self.seconds / self.fresh if self.fresh > 0 else None

    def move_bar(self, amount: float, note: str) -> None:
        """Move the bar on, if there is one, and write ``note`` behind it."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def is_due(self, *, after: float | None = None) -> bool:
        """Return whether a line is due, and take it as printed. after: seconds that count instead of ``interval``."""
        now = time.monotonic()
        if self._bar is not None or now - self._shown < (self._interval if after is None else after):
            return False
        self._shown = now
        return True

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class ByteProgress(Progress):
    """Progress through the bytes of files, inside a ``with``: a bar on a terminal, else a line every five seconds.

    total_bytes: bytes of all files. what: name of the work, which begins each line.
    """

    def __init__(self, total_bytes: int, *, what: str) -> None:
        super().__init__(total_bytes, done=0, interval=_SILENT_SECONDS, bar="B")
        self._what = what

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, num_bytes: int) -> None:
        """Count bytes that were done since the last call."""
        self.done += num_bytes
        self.move_bar(num_bytes, self._what)
        if self.is_due():
            percent = 100 * self.done / self.total if self.total else 100
            rate = self.fresh / 1e6 / self.seconds
            tell(
                f"{self._what}: {percent:.0f} % of {self.total} bytes, {rate:.1f} MB/s, {clock(self.seconds_left)} left"
            )


class DocumentProgress(Progress):
    """Progress through files or token streams, in bytes; counts documents, tokens and bad records.

    total_bytes: size of the input as it lies on disk. done_bytes: what an earlier run has done of it.
    log_interval: documents between two lines, which are also at least a second apart, and at most five.
    """

    def __init__(self, total_bytes: int, *, done_bytes: int, log_interval: int) -> None:
        super().__init__(total_bytes, done=done_bytes, interval=_SILENT_SECONDS, bar="B")
        self.documents = self.tokens = self.bad = 0
        self._log_interval = log_interval
        self._shown_documents = 0

    def add(self, *, num_bytes: int, documents: int, tokens: int, bad: int) -> None:
        """Count work that was done since the last call."""
        self.done += num_bytes
        self.documents += documents
        self.tokens += tokens
        self.bad += bad
        self.move_bar(num_bytes, f"{self._rates()}, {self.bad} bad")
        self.tick()

    def tick(self) -> None:
        """Print a line if one is due; called now and then, also while nothing is done."""
        many = self.documents - self._shown_documents >= self._log_interval
        if self.is_due(after=_LINE_SECONDS if many else None):
            self._shown_documents = self.documents
            tell(f"Processed {self.documents} documents, {self.bad} bad ({self._rates()}, {self._left()})")

    def summary(self) -> str:
        """Seconds and rates of the whole run."""
        return f"{self.seconds:.1f} s, {self._rates()}"

    def _rates(self) -> str:
        mega = self.fresh / 1e6 / self.seconds
        return f"{self.documents / self.seconds:.0f} docs/s, {mega:.1f} MB/s, {self.tokens / self.seconds:.3g} tokens/s"

    def _left(self) -> str:
        percent = 100 * self.done / self.total if self.total else 100
        left = self.seconds_left
        return f"{percent:.0f} %" if left is None else f"{percent:.0f} %, {left:.0f} s left"


class RangeProgress(Progress):
    """Progress of all ranks and jobs that write to one folder, in samples, as their committed ranges tell it.

    samples_done: counts the samples that are committed, by whomever. interval: seconds between two lines.
    done: participle for what is done with a sample, as "scored".
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
        self._samples_done, self._seq_length, self._participle = samples_done, seq_length, done
        first = samples_done()
        super().__init__(num_samples, done=first, interval=interval)
        if first:
            tell(f"continuing: {first} of {num_samples} samples are {done}")

    def tick(self, under_way: int) -> None:
        """Print a line if one is due. under_way: samples that this process has done and not yet committed."""
        if self.is_due():
            self.done = min(self._samples_done() + under_way, self.total)
            tell(self._line())

    def _line(self) -> str:
        text = f"{self._participle} {self.done} of {self.total} samples ({100 * self.done / self.total:.1f} %"
        left = self.seconds_left
        if left is None:
            return f"{text})"
        return f"{text}, {self.fresh * self._seq_length / self.seconds:.0f} tokens/s, {clock(left)} left)"


class RequestProgress(Progress):
    """Progress through requests or samples of different lengths, in tokens, as one copy of a model tells it.

    count: requests of all copies. tokens: tokens of all of them. what: word for a request, in the plural. says: False
    to print nothing. copies: copies of the model, which are as fast as this one.
    """

    def __init__(self, count: int, tokens: int, *, interval: float, what: str, says: bool, copies: int = 1) -> None:
        super().__init__(max(tokens, 1), done=0, interval=interval)
        self._count, self._finished = count, 0
        self._what, self._says, self._copies = what, says, copies

    def add(self, *, count: int, tokens: int) -> None:
        """Count what this copy has done since the last call, and print a line if one is due."""
        self._finished = min(self._finished + count * self._copies, self._count)
        self.done = min(self.done + tokens * self._copies, self.total)
        if self._says and self.is_due():
            tell(
                f"{self._what}: {self._finished} of {self._count} ({100 * self.done / self.total:.1f} % of the tokens, "
                f"{self.done / self.seconds:.0f} tokens/s, {clock(self.seconds_left)} left)"
            )


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds, as in 0:00:15; a dash where they are not known."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
