"""A pickle's plain values, read without looking up, let alone running, anything that it names. No torch.

Where it names a class or a function, stands a `Named` with that name instead: numbers, strings, lists and dicts are
themselves, a tensor's bytes are not read.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

from megakd.errors import CorruptError

# what an unpickler raises over bytes that no pickler wrote
BROKEN_PICKLE = (
    OSError, EOFError, pickle.UnpicklingError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError,
    NotImplementedError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


class Named:
    """What was pickled as an object of a class, or as a function's result: its arguments and its attributes."""

    name = ""

    def __new__(cls, *arguments: Any, **_keywords: Any) -> Named:
        made: Named = super().__new__(cls)
        made.arguments, made.attributes = arguments, {}
        return made

    def __init__(self, *arguments: Any, **_keywords: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.attributes.update(part)

    def append(self, _item: Any) -> None:
        """What a list would keep is not looked at."""

    def extend(self, _items: Any) -> None:
        """What a list would keep is not looked at."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self.attributes[key] = value

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


def read_pickle(path: Path) -> Any:
    """The plain values of a pickle file. Raises CorruptError for what is none."""
    try:
        with open(path, "rb") as stream:
            return _PlainUnpickler(stream).load()
    except BROKEN_PICKLE as error:
        raise CorruptError(f"{path} is not a pickle: {_first_line(error)}") from None


def read_torch_file(path: Path) -> Any:
    """The plain values of a file that ``torch.save`` wrote. Raises CorruptError for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                return _PlainUnpickler(stream).load()
    except StopIteration:
        raise CorruptError(f"{path} is not a file of torch.save: it has no data.pkl") from None
    except BROKEN_PICKLE as error:
        raise CorruptError(f"{path} is not a file of torch.save: {_first_line(error)}") from None


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._classes: dict[str, type[Named]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A class of its own for each name; nothing is imported."""
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return dict
        if full not in self._classes:
            self._classes[full] = type("Named", (Named,), {"name": full})
        return self._classes[full]

    def persistent_load(self, _pid: Any) -> Named:
        return Named()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
