"""``megakd pack``: write the starts of sentence packing beside a dataset, before any run asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakd.config import option, parse
from megakd.console import tell
from megakd.data.indexed import IndexedDataset
from megakd.data.recorded import open_tokenizer
from megakd.data.sentences import manifest_path, write_sentences
from megakd.data.tokenizer import TokenizerType
from megakd.errors import ExitStatus

HELP = "cut a dataset into samples that end with a sentence"


@dataclass(frozen=True)
class PackConfig:
    """What to cut, and how."""

    prefix: str = option(..., "dataset prefix, without .bin or .idx", positional=True)
    seq_length: int = option(1024, "tokens of one sample", common=True)
    tokenizer_type: TokenizerType | None = option(None, "the dataset's tokenizer (default: as it records)", common=True)
    tokenizer_model: str | None = option(None, "its file, or folder (default: as the dataset records)", common=True)
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer, its end of document not counted")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(PackConfig, argv, prog="megakd pack", description=HELP)
    dataset = IndexedDataset(config.prefix)
    tokenizer = open_tokenizer(
        dataset,
        tokenizer_type=config.tokenizer_type,
        tokenizer_model=config.tokenizer_model,
        vocab_size=config.vocab_size,
    )
    manifest = write_sentences(dataset, config.seq_length, tokenizer)
    count = manifest.parameters["num_samples"]
    tell(
        f"{manifest_path(dataset, config.seq_length)}: {count} samples of {dataset.num_tokens} tokens, "
        f"{dataset.num_tokens / count:.1f} of {config.seq_length + 1} tokens a sample",
        on="stdout",
    )
    return ExitStatus.COMPLETE
