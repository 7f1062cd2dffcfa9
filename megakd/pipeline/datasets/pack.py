"""``megakd pack``: write the sentence packing of a dataset beside it, before a run needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakd.artefacts.manifest import Manifest, find_finished, read_manifest, say_complete
from megakd.config.tree import option, parse
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.sentences import FORMAT, VERSION, manifest_path, write_sentences
from megakd.data.tokenizer import Tokenizer, TokenizerType
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import ExitStatus
from megakd.work.console import tell

HELP = "cut a dataset into samples that end with a sentence"


@dataclass(frozen=True)
class PackConfig:
    """Flags of ``megakd pack``."""

    prefix: str = option(..., "dataset prefix, without .bin or .idx", positional=True)
    seq_length: int = option(1024, "tokens of one sample", common=True)
    tokenizer_type: TokenizerType | None = option(
        None, "type of the dataset's tokenizer (default: as it records)", common=True
    )
    tokenizer_model: str | None = option(
        None, "file or folder of the tokenizer (default: as the dataset records)", common=True
    )
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer, its end of document not counted")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(PackConfig, argv, prog="megakd pack", description=HELP)
    dataset = IndexedDataset(config.prefix)
    tokenizer = open_tokenizer(
        dataset,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
    )
    manifest = _find_packing(dataset, config.seq_length, tokenizer)
    if manifest is None:
        manifest = write_sentences(dataset, config.seq_length, tokenizer)
    count = manifest.parameters["num_samples"]
    tell(
        f"{manifest_path(dataset, config.seq_length)}: {count} samples of {dataset.num_tokens} tokens, "
        f"{dataset.num_tokens / count:.1f} of {config.seq_length + 1} tokens a sample",
        on="stdout",
    )
    return ExitStatus.COMPLETE


def _find_packing(dataset: IndexedDataset, seq_length: int, tokenizer: Tokenizer) -> Manifest | None:
    """Find the packing of the dataset; None where there is none, or only one of an older dataset at this prefix.

    Raises MismatchError for a packing that another tokenizer made.
    """
    path = manifest_path(dataset, seq_length)
    parents = {"dataset": dataset.fingerprint}
    if not path.exists() or read_manifest(path, format=FORMAT, check_files=False).parents != parents:
        return None
    done = find_finished(
        path,
        format=FORMAT,
        version=VERSION,
        parameters={"packing": "sentence", "seq_length": seq_length},
        parents=parents,
        tokenizer=tokenizer.describe(),
        flag="tokenizer, the one that it was made with",
    )
    if done is not None:
        say_complete(path)
    return done
