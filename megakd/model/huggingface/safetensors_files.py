"""Safetensors of a folder: which tensor lies where, read from index and headers, and checked. No torch.

A file is eight bytes with the length of its header, the header, and the numbers of all tensors, one after the other.
The header is a JSON object: name -> type, sizes, first and last byte. An index names the file of each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.errors import CorruptError, MismatchError, UsageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes; the format's own bound
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_GIT_LFS = b"version https://git-lfs.github.com/spec/"  # what git leaves in a file's place without its extension LFS
_SHOWN = 5


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: type by its safetensors name, sizes, and place of its numbers from the file's first byte."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def find_files(folder: Path, role: str) -> tuple[Path, ...]:
    """Return the files of tensors in ``folder``, those that the index names if there is one.

    Raises:
        UsageError: there are none, or only pickles; says what to do. CorruptError: the index is damaged, or names files
            that are missing.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CorruptError(
                f"{role}: {folder} lacks {_listed(missing)}, which {INDEX} names: copy the folder again, whole"
            )
        return tuple(folder / name for name in names)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if gone := [path.name for path in files if not path.is_file()]:
        raise CorruptError(
            f"{role}: {folder} has links to files that are not there ({_listed(gone)}): download it again, or copy it "
            "with what its links point to (cp -L)"
        )
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{role}: {folder} holds its weights as pickles ({_listed(pickles)}), which can run code when they are "
            'read: megakd reads safetensors alone. Where you trust the folder, write one: python -c "import '
            "transformers; transformers.AutoModelForCausalLM.from_pretrained('IN', torch_dtype='auto')"
            ".save_pretrained('OUT')\", and copy its tokenizer files there"
        )
    gguf = ", but GGUF files, which are quantised" if any(folder.glob("*.gguf")) else ""
    raise UsageError(f"{role}: {folder} has a config.json and no safetensors{gguf}; expected {SINGLE} or {INDEX}")


def read_headers(folder: Path, role: str) -> dict[str, StoredTensor]:
    """Return every tensor in ``folder`` by name.

    Raises:
        UsageError, CorruptError: as `find_files`; or a header is damaged, a file is cut or longer than its header says,
            a tensor lies in two files, or index and headers differ. The message names file and tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in find_files(folder, role):
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CorruptError(
                    f"{role}: {tensor.name} lies in {tensors[tensor.name].file.name} and in {file.name} of {folder}: "
                    "expected it once"
                )
            tensors[tensor.name] = tensor
    if (folder / INDEX).is_file():
        _check_index(folder, tensors, role)
    return tensors


def read_header(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one file, in the order of their bytes.

    Raises:
        CorruptError: the file is damaged. MismatchError: names a tensor of a type that is unknown here.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            stream.seek(0)
            if stream.read(len(_GIT_LFS)) == _GIT_LFS:
                raise CorruptError(f"{file}: a pointer of Git LFS in place of the weights: run 'git lfs pull' there")
            raise CorruptError(f"{file}: {size} bytes, and a header of {length}: not a safetensors file, or cut short")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        stored = [_stored(file, name, entry, 8 + length) for name, entry in entries]
    except MismatchError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"{file}: its header cannot be read: {type(error).__name__}: {error}") from None
    place = 8 + length
    stored.sort(key=lambda tensor: tensor.start)
    for tensor in stored:
        if tensor.start != place:
            raise CorruptError(f"{file}: {tensor.name} begins at byte {tensor.start}, expected {place}")
        place += tensor.num_bytes
    if place != size:
        raise CorruptError(f"{file}: {size} bytes, expected {place}; the file was cut, replaced or half copied")
    yield from stored


def _stored(file: Path, name: str, entry: Mapping[str, Any], offset: int) -> StoredTensor:
    first, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in ITEM_BYTES:
        raise MismatchError(f"{file}: {name} has the type {entry['dtype']}; expected one of {', '.join(ITEM_BYTES)}")
    tensor = StoredTensor(name, file, entry["dtype"], shape, offset + int(first))
    if any(size < 0 for size in shape) or end - first != tensor.num_bytes:
        raise ValueError(f"{name} has {end - first} bytes and the sizes {list(shape)} of {entry['dtype']}")
    return tensor


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        correct = all(isinstance(file, str) and file and "/" not in file for file in names.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not names or not correct:
        raise CorruptError(f"{path}: its weight_map is not name -> file in the folder")
    return dict(names)


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor], role: str) -> None:
    named = _weight_map(folder)
    problems = [f"{name} is not in {file}" for name, file in named.items() if name not in tensors]
    problems += [
        f"{name} is in {tensor.file.name}, and {INDEX} says {named.get(name, 'nothing of it')}"
        for name, tensor in tensors.items()
        if named.get(name) != tensor.file.name
    ]
    if problems:
        raise CorruptError(f"{role}: {folder}: {_listed(problems)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" ... ({len(names)} in all)" if len(names) > _SHOWN else "")
