"""A Hugging Face folder: configuration, tensors and tokenizer, checked against one another and described. No torch.

It is described as a checkpoint of ours is, by a manifest, so that fingerprints, parents and the refusal of another
tokenizer are the same for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd import __version__
from megakd.artefacts.manifest import FileRecord, Manifest, hash_file
from megakd.data.tokenizer import Tokenizer, build_tokenizer
from megakd.errors import MismatchError
from megakd.layout import is_first_rank
from megakd.model.checkpoint.damage import FORMAT, MANIFEST, VERSION
from megakd.model.checkpoint.foreign import weights_alone
from megakd.model.config import ModelShape
from megakd.model.huggingface.config_json import CONFIG, HfModel, read_config_json, read_json
from megakd.model.huggingface.families.table import HfTensor
from megakd.model.huggingface.safetensors_files import INDEX, StoredTensor, find_files, read_headers
from megakd.work.progress import ByteProgress

FORM = "huggingface"
GENERATION_CONFIG = "generation_config.json"
ADAPTER = "adapter_config.json"  # of peft's
_TYPES = {"BF16", "F16", "F32"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = (".rotary_emb.inv_freq", ".masked_bias")  # endings of buffers that older folders hold and no class reads
_COMPARED_BYTES = 1 << 24
_LONG_BYTES = 1 << 30
_SHOWN = 8


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face folder whose tensors are those of its model, each once, in the sizes that it has there.

    shape: with ``tied`` and ``bf16`` as the tensors have it. expected: the model's tensors, in the order of layers.
    """

    path: Path
    model: HfModel
    shape: ModelShape
    stored: Mapping[str, StoredTensor]
    expected: tuple[HfTensor, ...]

    @property
    def rows(self) -> int:
        """Rows of the embedding, padding among them."""
        return self.model.rows


def is_hf_folder(path: Path) -> bool:
    """Return whether ``path`` looks like a Hugging Face folder: a ``config.json`` that names a type of model."""
    if not (path / CONFIG).is_file() or (path / ".metadata").exists():
        return False
    return "model_type" in (path / CONFIG).read_text(errors="replace")


def files_of_no_model(path: Path) -> str | None:
    """Return what to do with a folder of Hugging Face's files that are no whole model; None without such files."""
    if (path / ADAPTER).is_file():
        return (
            f"{ADAPTER}: an adapter (LoRA) without its model; merge the two with peft's merge_and_unload, and "
            "save_pretrained what comes out"
        )
    if (path / INDEX).is_file() or any(path.glob("*.safetensors")):
        return f"safetensors without a {CONFIG} that names a model_type: copy it from where the weights come from"
    return None


def open_folder(path: Path, role: str) -> HfFolder:
    """Read a folder's configuration and headers, and hold one against the other.

    Raises:
        UsageError, CorruptError, MismatchError: the configuration is not one that models here have; files are missing
            or damaged; an adapter lies beside them; or tensors are missing, left over, of another size or type, each
            by its name.
    """
    if (path / ADAPTER).is_file():
        raise MismatchError(
            f"{role}: {path} has an {ADAPTER}: an adapter (LoRA) belongs to the weights, and would be left out; merge "
            "it with peft's merge_and_unload, or move it elsewhere if the weights are meant without it"
        )
    model = read_config_json(path, role)
    stored = read_headers(path, role)
    tied = _tied(model, stored, f"{role}: {path}")
    expected = tuple(model.family.tensors(dataclasses.replace(model.shape, tied=tied), model.rows))
    known = {tensor.theirs for tensor in expected} | ({HEAD} if tied else set())
    _check_tensors(model, expected, known, stored, f"{role}: {path}")
    used = [stored[tensor.theirs] for tensor in expected]
    shape = dataclasses.replace(model.shape, tied=tied, bf16=all(tensor.dtype == "BF16" for tensor in used))
    return HfFolder(path, model, shape, stored, expected)


def describe_folder(path: Path, role: str) -> Manifest:
    """Return the manifest that a folder would have as a checkpoint; its tensors are read whole, for their hashes.

    The vocabulary is the tokenizer's; without a tokenizer in the folder it is not known, and the rows of the embedding
    stand for it.

    Raises:
        UsageError, CorruptError, MismatchError: as `open_folder`; or the tokenizer has more ids than the embedding has
            rows.
    """
    folder = open_folder(path, role)
    tokenizer = tokenizer_of(path)
    if tokenizer is not None and tokenizer.vocab_size > folder.rows:
        raise MismatchError(
            f"{role}: {path}: the embedding has {folder.rows} rows, the tokenizer beside it {tokenizer.vocab_size} "
            "ids: it is another model's, or tokens were added and no rows"
        )
    return Manifest(
        path=path / MANIFEST,
        format=FORMAT,
        version=VERSION,
        megakd_version=__version__,
        parameters={
            "form": FORM,
            "iteration": 0,
            **weights_alone(
                folder.shape,
                vocab_size=folder.rows if tokenizer is None else tokenizer.vocab_size,
                seq_length=folder.shape.max_position_embeddings or 0,
            ),
            "huggingface": settings_of(folder),
        },
        parents={},
        tokenizer=None if tokenizer is None else tokenizer.describe(),
        files=_hashed(path, role),
    )


def settings_of(folder: HfFolder) -> dict[str, Any]:
    """Return what an export needs and a shape does not hold: the folder's own configuration and that of generation."""
    generation = folder.path / GENERATION_CONFIG
    return {
        "config": dict(folder.model.config),
        "generation_config": read_json(generation) if generation.is_file() else None,
        "head_is_stored": HEAD in folder.stored,
    }


def tokenizer_of(path: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder: its ``tokenizer.json``, else its sentencepiece model; None without either."""
    if (path / "tokenizer.json").is_file():
        return build_tokenizer("HuggingFaceTokenizer", path, model_flag=f"{path}:", type_flag=None)
    models = [model for model in path.glob("*.model") if model.is_file()]
    if len(models) == 1:
        return build_tokenizer("SentencePieceTokenizer", models[0], model_flag=f"{path}:", type_flag=None)
    return None


def _tied(model: HfModel, stored: Mapping[str, StoredTensor], what: str) -> bool:
    """Return whether the model's head is its embedding.

    Raises:
        MismatchError: the configuration says so, and the folder has a head with other numbers.
    """
    if not model.shape.tied or HEAD not in stored or EMBEDDING not in stored:
        return model.shape.tied
    if _equal_bytes(stored[EMBEDDING], stored[HEAD]):
        return True
    source = "is true" if model.tied_is_explicit else f"is missing, which means true for {model.family.model_type}"
    raise MismatchError(
        f"{what}: {HEAD} has other numbers than {EMBEDDING}, and tie_word_embeddings {source}: one version of "
        "transformers takes the head and another the embedding. Set tie_word_embeddings to false in config.json if the "
        f"head is the model's, or leave {HEAD} out"
    )


def _equal_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open(first.file, "rb") as left, open(second.file, "rb") as right:
        left.seek(first.start)
        right.seek(second.start)
        for done in range(0, first.num_bytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, first.num_bytes - done)
            if left.read(size) != right.read(size):
                return False
    return True


def _check_tensors(
    model: HfModel, expected: tuple[HfTensor, ...], known: set[str], stored: Mapping[str, StoredTensor], what: str
) -> None:
    """Refuse tensors that are missing, left over, or of another size or type than the model's."""
    missing = [tensor.theirs for tensor in expected if tensor.theirs not in stored]
    more = sorted(name for name in stored if name not in known and not name.endswith(_IGNORED))
    sizes = [
        f"{tensor.theirs} is {list(stored[tensor.theirs].shape)}, expected {list(tensor.size)}"
        for tensor in expected
        if tensor.theirs in stored and stored[tensor.theirs].shape != tensor.size
    ]
    types = [
        f"{name} is {stored[name].dtype}" for name in sorted(known & set(stored)) if stored[name].dtype not in _TYPES
    ]
    problems = [
        f"{label} {'; '.join(names[:_SHOWN])} ({len(names)} in all)"
        for label, names in (
            ("missing are", missing),
            ("left over are", more),
            ("of another size:", sizes),
            (f"of another type than {', '.join(sorted(_TYPES))}:", types),
        )
        if names
    ]
    if problems:
        hint = ""
        if missing == [HEAD]:
            why = "is false there" if model.tied_is_explicit else f"missing means false for {model.family.model_type}"
            hint = f". If the head is the embedding, say so in config.json: tie_word_embeddings true ({why})"
        raise MismatchError(
            f"{what}: not the tensors of a {model.family.model_type} as config.json describes it: "
            f"{'; '.join(problems)}{hint}"
        )


def _hashed(path: Path, role: str) -> tuple[FileRecord, ...]:
    """Return the records of the files that determine the model: configuration, index and tensors."""
    files = [path / CONFIG, *([path / INDEX] if (path / INDEX).is_file() else []), *find_files(path, role)]
    total = sum(file.stat().st_size for file in files)
    if total < _LONG_BYTES or not is_first_rank():
        return tuple(hash_file(file) for file in files)
    with ByteProgress(total, what=f"{role}: fingerprint of {path.name}") as progress:
        return tuple(hash_file(file, progress=progress.update) for file in files)
