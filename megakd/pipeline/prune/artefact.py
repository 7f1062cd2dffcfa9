"""Importance of a teacher's parts on disk: raw arrays of float64 and a manifest. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.manifest import HashingWriter, Manifest, faults_in_blocks, read_manifest, write_manifest
from megakd.errors import CorruptError, MismatchError
from megakd.model.config import ModelShape

FORMAT, VERSION = "megakd-importance", 1
MANIFEST = "importance.json"
LAYERS, HEADS, NEURONS, CHANNELS = "influence.f64", "heads.f64", "neurons.f64", "channels.f64"


@dataclass(frozen=True)
class Importance:
    """Importance of each part of a teacher, float64; what is larger adds more to the result.

    layers_L: influence 1 - cos(input, output) of each layer, from 0 to 2. heads_LA: of each query head. neurons_LF: of
    each feed-forward neuron. channels_H: of each channel of the residual stream. loss: nats a token of the teacher on
    the calibration samples. manifest: None before it is written.
    """

    layers_L: NDArray[np.float64]
    heads_LA: NDArray[np.float64]
    neurons_LF: NDArray[np.float64]
    channels_H: NDArray[np.float64]
    loss: float
    manifest: Manifest | None = None

    def check(self, teacher: ModelShape, *, settings: Mapping[str, Any], parents: Mapping[str, str]) -> None:
        """Refuse importance of another teacher, or measured in another way than the flags say.

        Raises:
            MismatchError: tells what differs, with both values. CorruptError: sizes that are not the teacher's.
        """
        assert self.manifest is not None
        if wrong := self.manifest.differences(settings, parents, self.manifest.tokenizer):
            raise MismatchError(
                f"--importance {self.manifest.path.parent} was measured on another teacher or in another way: "
                f"{'; '.join(wrong)}; leave it out to measure anew"
            )
        layers = teacher.num_layers
        sizes = (layers,), (layers, teacher.num_attention_heads), (layers, teacher.ffn_hidden_size)
        for name, array, size in zip(
            (LAYERS, HEADS, NEURONS, CHANNELS),
            (self.layers_L, self.heads_LA, self.neurons_LF, self.channels_H),
            (*sizes, (teacher.hidden_size,)),
        ):
            if array.shape != size:
                raise CorruptError(f"{self.manifest.path.parent / name}: {array.shape} numbers, expected {size}")


def write_importance(
    folder: str | os.PathLike[str],
    importance: Importance,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
) -> Manifest:
    """Write the arrays and then the manifest into ``folder``."""
    arrays = {
        LAYERS: importance.layers_L,
        HEADS: importance.heads_LA,
        NEURONS: importance.neurons_LF,
        CHANNELS: importance.channels_H,
    }
    files = []
    for name, array in arrays.items():
        with HashingWriter(Path(folder) / name) as stream:
            stream.write(np.ascontiguousarray(array, "<f8").tobytes())
            files.append(stream.commit())
    return write_manifest(
        Path(folder) / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**settings, "loss": importance.loss, "num_layers": len(importance.layers_L)},
        parents=parents,
        tokenizer=tokenizer,
        files=files,
    )


def read_importance(folder: str | os.PathLike[str]) -> Importance:
    """Read what `write_importance` wrote.

    Raises UsageError if there is none, CorruptError for damaged files.
    """
    path = Path(folder)
    manifest = read_manifest(path / MANIFEST, format=FORMAT, version=VERSION)
    if faults := faults_in_blocks(manifest):
        raise CorruptError(f"--importance {path} is damaged: {faults[0]}; leave it out to measure anew")
    layers, heads, neurons, channels = (np.fromfile(path / name, "<f8") for name in (LAYERS, HEADS, NEURONS, CHANNELS))
    rows = int(manifest.parameters["num_layers"])
    loss = float(manifest.parameters["loss"])
    return Importance(layers, heads.reshape(rows, -1), neurons.reshape(rows, -1), channels, loss, manifest)
