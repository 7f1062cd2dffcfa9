"""Cache of results that took long, in the user's cache folder; to lose or damage it costs time alone.

The folder is ``$MEGAKD_CACHE_DIR``, else ``$XDG_CACHE_HOME/megakd``, else ``~/.cache/megakd``. Where it cannot be
written, nothing is kept.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import xxhash


def remember(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Result of ``make`` for this key, from the cache where it is there.

    kind: a word for the file's name. The key and the result are data that JSON can hold; tuples become lists.
    Processes that ask at the same time may each call ``make``; one result stays.
    """
    key = _as_json(key)
    path = _path(kind, key)
    kept = None if path is None else _read(path, key)
    if kept is None:
        kept = {"key": key, "value": _as_json(make())}
        if path is not None:
            _write(path, kept)
    return kept["value"]


def _path(kind: str, key: Any) -> Path | None:
    chosen = os.environ.get("MEGAKD_CACHE_DIR")
    if chosen:
        folder = Path(chosen)
    elif os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"]) / "megakd"
    else:
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        folder = Path(home) / ".cache" / "megakd"
    return folder / f"{kind}-{_digest(key)}.json"


def _as_json(data: Any) -> Any:
    return orjson.loads(orjson.dumps(data))


def _digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def _read(path: Path, key: Any) -> dict[str, Any] | None:
    """Record that was kept under a key; None where there is none, or where it is damaged."""
    try:
        record = orjson.loads(path.read_bytes())
        kept: dict[str, Any] = record["kept"]
        return kept if record["xxh3_128"] == _digest(kept) and kept["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, kept: dict[str, Any]) -> None:
    data = orjson.dumps({"xxh3_128": _digest(kept), "kept": kept}, option=orjson.OPT_INDENT_2)
    with contextlib.suppress(OSError):  # no home, a full disk: the next run computes it again
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
