"""How far a run has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from megakd.work.console import tell

_LINE_SECONDS, _SILENT_SECONDS = 1.0, 5.0


class Progress:
    """Counts bytes, documents, tokens and bad records, and shows rates and the time that is left, on stderr.

    total_bytes: of the input as it lies on disk. done_bytes: already done by an earlier run.
    log_interval: documents between two plain lines, which are also at least a second apart, and at most five.
    """

    def __init__(self, total_bytes: int, *, done_bytes: int, log_interval: int) -> None:
        self.documents = self.tokens = self.bad = 0
        self._total, self._done, self._skipped = total_bytes, done_bytes, done_bytes
        self._interval = log_interval
        self._started = self._shown = time.monotonic()
        self._shown_documents = 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, mininterval=0.3)

    def add(self, *, num_bytes: int, documents: int, tokens: int, bad: int) -> None:
        """Count what was done since the last call."""
        self._done += num_bytes
        self.documents += documents
        self.tokens += tokens
        self.bad += bad
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rates()}, {self.bad} bad", refresh=False)
            self._bar.update(num_bytes)
        self.tick()

    def tick(self) -> None:
        """Print a plain line if one is due; called now and then, also while nothing is done."""
        silent = time.monotonic() - self._shown
        many = self.documents - self._shown_documents >= self._interval
        if self._bar is None and (silent >= _SILENT_SECONDS or (many and silent >= _LINE_SECONDS)):
            self._shown, self._shown_documents = time.monotonic(), self.documents
            tell(f"Processed {self.documents} documents, {self.bad} bad ({self._rates()}, {self._left()})")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> str:
        """The rates of the whole run."""
        return f"{time.monotonic() - self._started:.1f} s, {self._rates()}"

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        mega = (self._done - self._skipped) / 1e6 / seconds
        return f"{self.documents / seconds:.0f} docs/s, {mega:.1f} MB/s, {self.tokens / seconds:.3g} tokens/s"

    def _left(self) -> str:
        seconds = time.monotonic() - self._started
        rate = (self._done - self._skipped) / seconds if seconds > 0 else 0
        percent = 100 * self._done / self._total if self._total else 100
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        return f"{percent:.0f} %{left}"
