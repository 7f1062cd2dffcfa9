"""``torch_dist`` checkpoints that Megatron-LM or plain megatron-core wrote, described as if they were ours. No torch.

Such a checkpoint has no manifest. Its description is read from ``.metadata`` (names and sizes of tensors) and, if
Megatron-LM wrote it, from the run's arguments in ``common.pt``; both are pickles, and nothing that they name is run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd import __version__
from megakd.artefacts.manifest import Manifest, hash_file
from megakd.config.tree import from_dict, to_dict, validate
from megakd.config.yaml_file import read_config_file
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.model.checkpoint.damage import FORMAT, MANIFEST, VERSION
from megakd.model.checkpoint.megatron_args import model_of_args
from megakd.model.checkpoint.plain_pickle import Named, read_pickle, read_torch_file
from megakd.model.config import ModelConfig, ModelShape

METADATA, COMMON, BACKENDS = ".metadata", "common.pt", "metadata.json"
_EMBEDDING = "embedding.word_embeddings.weight"
_KNOWN_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class KeyForm:
    """Form of the names of weights in a checkpoint.

    prefix: stands before each name. layers_apart: each layer has numbered tensors of its own, instead of one stack.
    """

    prefix: str = ""
    layers_apart: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> KeyForm:
        """Return the form of these names of tensors; the plain one if there is no embedding among them."""
        names = list(names)
        prefixes = [name.removesuffix(_EMBEDDING) for name in names if name.endswith(_EMBEDDING)]
        prefix = min((prefix for prefix in prefixes if "optim" not in prefix), key=len, default="")
        apart = any(re.match(re.escape(prefix) + r"decoder\.layers\.\d+\.", name) for name in names)
        return cls(prefix, apart)

    def plain(self, name: str) -> str:
        """Return the name that a weight with the prefix has in this project's checkpoints."""
        return re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", name.removeprefix(self.prefix))


def is_checkpoint(path: Path) -> bool:
    """Return True if ``path`` is a finished ``torch_dist`` checkpoint: megatron-core writes `BACKENDS` last."""
    return (path / BACKENDS).is_file() and (path / METADATA).is_file()


def check_backends(path: Path) -> None:
    """Refuse a checkpoint in a form that this megatron-core does not read.

    Raises:
        MismatchError: names what differs. CorruptError: the file is not megatron-core's.
    """
    try:
        found = json.loads((path / BACKENDS).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path / BACKENDS} cannot be read: {error}") from None
    if not isinstance(found, dict) or "sharded_backend" not in found:
        raise CorruptError(f"{path / BACKENDS} is not megatron-core's: it tells no sharded_backend")
    wrong = [
        f"{key} is {value!r}, expected {_KNOWN_BACKENDS.get(key, 'no such key')!r}"
        for key, value in found.items()
        if key not in _KNOWN_BACKENDS or value != _KNOWN_BACKENDS[key]
    ]
    if wrong:
        raise MismatchError(
            f"{path / BACKENDS}: {'; '.join(wrong)}: written in another form (Megatron-LM: --ckpt-format torch_dist), "
            "or by another version of megatron-core than 0.16; save it with one of those"
        )


def describe_foreign(path: Path, *, role: str, given: ModelShape | None = None) -> Manifest:
    """Return the manifest that the checkpoint at ``path`` would have; its files are read whole, for their hashes.

    given: the model, for a checkpoint that does not describe it.

    Raises:
        MismatchError: the model cannot be run here; names what differs. UsageError: the model is described nowhere.
        CorruptError: files cannot be read.
    """
    check_backends(path)
    sizes = read_sizes(path)
    form = KeyForm.of(sizes)
    weights = {form.plain(name): size for name, size in sizes.items() if name.startswith(form.prefix)}
    if _EMBEDDING not in weights:
        raise MismatchError(f"{role}: {path} holds no GPT model: no tensor is named ...{_EMBEDDING}")
    common = read_torch_file(path / COMMON)
    args = common.get("args") if isinstance(common, dict) else None
    if isinstance(args, Named) and args.attributes.get("num_layers"):
        shape = model_of_args(args.attributes, weights, role=f"{role}: {path}").resolve(f"{role}: {path}")
    elif given is not None:
        shape = given
    else:
        raise UsageError(
            f"{role}: {path} does not tell its model (Megatron-LM's arguments are not in it): describe it in a YAML "
            "file with the keys of the group 'student' (num_layers, hidden_size, ...), or the config.yaml of a run: "
            "--model-config FILE, in train --teacher-model-config FILE"
        )
    _check_names(weights, shape, f"{role}: {path}")
    iteration = common.get("iteration") if isinstance(common, dict) else None
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    return Manifest(
        path=path / MANIFEST,
        format=FORMAT,
        version=VERSION,
        megakd_version=__version__,
        parameters={
            "iteration": iteration if isinstance(iteration, int) else _number(path),
            **weights_alone(
                shape,
                vocab_size=weights[_EMBEDDING][0],
                seq_length=int(args.attributes.get("seq_length") or 0) if isinstance(args, Named) else 0,
            ),
        },
        parents={},
        tokenizer=None,
        files=tuple(dataclasses.replace(hash_file(file), name=str(file.relative_to(path))) for file in files),
    )


def weights_alone(shape: ModelShape, *, vocab_size: int, seq_length: int) -> dict[str, Any]:
    """Return the parameters of a manifest for weights without a run: to start from, with nothing to continue."""
    return {
        "foreign": True,
        "shape": to_dict(shape),
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "loader_state": {},
        "layout": {},
        "use_distributed_optimizer": False,
        "rng_states": False,
    }


def read_shape(file: str | Path, role: str) -> ModelShape:
    """Return the model that a YAML file describes: the keys of the group ``student``, or a run's whole configuration.

    Raises:
        UsageError: the file is another one, a key is unknown, or a size is missing.
    """
    tree = read_config_file(str(file), role)
    if isinstance(tree.get("student"), dict):
        tree = tree["student"]
    config = from_dict(ModelConfig, tree)
    validate(config)
    return config.resolve(f"{role}: {file}")


def read_sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the tensors in a checkpoint, by name. Raises CorruptError."""
    metadata = read_pickle(path / METADATA)
    tensors = metadata.attributes.get("state_dict_metadata") if isinstance(metadata, Named) else None
    if not isinstance(tensors, dict):
        raise CorruptError(f"{path / METADATA} lists no tensors")
    sizes = {}
    for name, stored in tensors.items():
        size = stored.attributes.get("size") if isinstance(stored, Named) else None
        if isinstance(name, str) and isinstance(size, Named) and size.arguments:
            sizes[name] = tuple(int(length) for length in size.arguments[0])
    return sizes


def _check_names(weights: Mapping[str, tuple[int, ...]], shape: ModelShape, what: str) -> None:
    """Refuse weights that the model would not use, because it would not compute what the trained model did."""
    ours = {name for name in weights if name.startswith(("embedding.", "decoder.", "output_layer."))}
    known = shape.weight_names()
    if shape.num_experts:
        known |= {name for name in ours if re.match(r"decoder\.layers\.(mlp|pre_mlp_layernorm)\.", name)}
    more = sorted(name for name in ours - known if "_extra_state" not in name)
    missing = sorted(known - ours)
    if more or missing:
        lists = [f"has {', '.join(more[:5])} ({len(more)} in all)"] * bool(more)
        lists += [f"lacks {', '.join(missing[:5])} ({len(missing)} in all)"] * bool(missing)
        raise MismatchError(f"{what} is of another model than RMSNorm, SwiGLU and rotary positions: {'; '.join(lists)}")


def _number(path: Path) -> int:
    return int(path.name.removeprefix("iter_")) if re.fullmatch(r"iter_\d+", path.name) else 0
