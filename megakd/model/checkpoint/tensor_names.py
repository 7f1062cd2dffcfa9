"""List of the tensors in a checkpoint, unpickled without running anything that it names. torch, but no megatron."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megakd.errors import CorruptError, MismatchError
from megakd.model.checkpoint.foreign import KeyForm
from megakd.model.checkpoint.plain_pickle import BROKEN_PICKLE
from megakd.model.config import ModelShape
from megakd.model.huggingface.folder import is_hf_folder

# module -> names that a real ``.metadata`` has; None: any name of a module of plain dataclasses and enums
_METADATA_NAMES: dict[str, set[str] | None] = {
    "torch": None,
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.planner": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
}
_TORCH_VALUES = (
    torch.dtype,
    torch.layout,
    torch.memory_format,
)  # the only names of ``torch`` that are allowed, beside Size


def read_metadata(path: Path) -> Metadata:
    """Return the list of the tensors in the checkpoint at ``path``: sizes, chunks, and the place of each in the files.

    megatron-core unpickles ``.metadata`` without restriction; this reads it first, with an unpickler that resolves only
    torch's plain checkpoint classes.

    Raises:
        CorruptError: the file is missing, cut short, or names something else, which the message tells.
    """
    try:
        with open(path / ".metadata", "rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError(f"it holds a {type(metadata).__name__}, not a list of tensors")
        return metadata
    except BROKEN_PICKLE as error:
        raise CorruptError(f"{path / '.metadata'} cannot be trusted: {error}") from None


def read_tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in the checkpoint at ``path``. Raises CorruptError as `read_metadata` does."""
    return set(read_metadata(path).state_dict_metadata)


def check_weights(path: Path, shape: ModelShape, role: str) -> None:
    """Refuse a checkpoint that lacks a weight of ``shape``, which would keep its initial value.

    Raises:
        MismatchError: names the missing weights.
    """
    if is_hf_folder(path):
        return  # its tensors were held against its model when it was described
    names = read_tensor_names(path)
    form = KeyForm.of(names)
    missing = sorted(shape.weight_names() - {form.plain(name) for name in names if name.startswith(form.prefix)})
    if missing:
        raise MismatchError(
            f"{role}: {path} does not fit the model: {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} missing ({len(missing)} in all)"
        )


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _METADATA_NAMES.get(module, set())
        if module in _METADATA_NAMES and (allowed is None or name in allowed):
            found = super().find_class(module, name)
            if module != "torch" or isinstance(found, _TORCH_VALUES) or found is torch.Size:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
