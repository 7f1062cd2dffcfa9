"""Datasets that are there already: the same one is kept, another one is not replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.artefacts.finished import find_finished
from megakd.artefacts.manifest import Manifest
from megakd.data.indexed.idx_format import bin_path, idx_path, manifest_path
from megakd.data.indexed.writer import FORMAT as DATASET
from megakd.data.indexed.writer import FORMAT_VERSION as DATASET_VERSION
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
    """The manifest of the dataset at ``prefix``, as `find_finished` says it.

    unfinished: whether a run that was killed may have left the files without their manifest. Else they are another
    program's, and a MismatchError.
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
        version=DATASET_VERSION,
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
        flag=flag,
    )
