"""Reading of a pickle's plain values, without looking up, let alone running, anything that it names. No torch.

Numbers, strings, lists and dicts are themselves; a class or a function is replaced by a `Named` with its name; the
bytes of tensors are not read.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

from megakd.errors import CorruptError

# exceptions of an unpickler over bytes that no pickler wrote
BROKEN_PICKLE = (
    OSError, EOFError, pickle.UnpicklingError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError,
    NotImplementedError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


class Named:
    """Stand-in for an object of a class, or for a function's result: its arguments and its attributes."""

    name = ""

    def __new__(cls, *arguments: Any, **_keywords: Any) -> Named:
        stand_in: Named = super().__new__(cls)
        stand_in.arguments, stand_in.attributes = arguments, {}
        return stand_in

    def __init__(self, *arguments: Any, **_keywords: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.attributes.update(part)

    def append(self, _item: Any) -> None:
        """Ignore an item of an object that is a list."""

    def extend(self, _items: Any) -> None:
        """Ignore items of an object that is a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self.attributes[key] = value

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


def read_pickle(path: Path) -> Any:
    """Return the plain values of a pickle file. Raises CorruptError if it is not one."""
    try:
        with open(path, "rb") as stream:
            return _PlainUnpickler(stream).load()
    except BROKEN_PICKLE as error:
        raise CorruptError(f"{path} is not a pickle: {_first_line(error)}") from None


def read_torch_file(path: Path) -> Any:
    """Return the plain values of a file that ``torch.save`` wrote. Raises CorruptError if it is not one."""
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
        """Return a class of its own for each name; nothing is imported."""
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
