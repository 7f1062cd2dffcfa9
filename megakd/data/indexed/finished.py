"""Datasets that exist already: the same dataset is kept, a different one is not replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, find_finished
from megakd.data.indexed.idx_format import bin_path, idx_path, manifest_path
from megakd.data.indexed.writer import FORMAT as DATASET
from megakd.data.indexed.writer import FORMAT_VERSIONS
from megakd.errors import MismatchError


def find_dataset(
    prefix: str | Path,
    *,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
    flag: str,
    unfinished: bool = False,
) -> Manifest | None:
    """Read the manifest of the dataset at ``prefix`` if it is the one that would be made now; see `find_finished`.

    unfinished: True if a killed run may have left files without their manifest, which are then made again. Otherwise
    such files are another program's, and raise MismatchError.
    """
    path = manifest_path(prefix)
    if not path.exists() and not unfinished and bin_path(prefix).exists() and idx_path(prefix).exists():
        raise MismatchError(
            f"{prefix}: a dataset without a manifest lies there, as Megatron's own tools and killed runs leave it; it "
            f"is not replaced. Give another {flag}, or remove its .bin and .idx"
        )
    return find_finished(
        path,
        format=DATASET,
        version=FORMAT_VERSIONS,
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
        flag=flag,
    )
