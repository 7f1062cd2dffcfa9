"""Hashes of input files, computed in a thread while other processes do the work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from megakd.artefacts.durable_files import hash_file
from megakd.errors import StoppedBySignal


class BackgroundHashes:
    """XXH3-128 of files, computed in a thread. stopped: asked after each piece; once True, the thread ends."""

    def __init__(self, paths: list[Path], *, stopped: Callable[[], bool]) -> None:
        self._hashes: list[str] = []
        self._error: OSError | None = None
        self._stopped = stopped
        self._thread = threading.Thread(target=self._run, args=(paths,), daemon=True)
        self._thread.start()

    def wait(self) -> list[str]:
        """Wait for the hashes, in the order of the paths. Raises StoppedBySignal, and OSError for a file that cannot be
        read."""
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._error is not None:
            raise self._error
        if self._stopped():
            raise StoppedBySignal("stopped by a signal")
        return self._hashes

    def _run(self, paths: list[Path]) -> None:
        def check(_: int) -> None:
            if self._stopped():
                raise StoppedBySignal

        try:
            for path in paths:
                self._hashes.append(hash_file(path, progress=check).xxh3_128)
        except OSError as error:
            self._error = error
        except StoppedBySignal:
            return
