"""Flags of ``megakd generate``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.data.tokenizers.base import TokenizerType
from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.model.checkpoint.foreign import read_shape
from megakd.model.config import ModelShape


@dataclass(frozen=True)
class GenerateConfig:
    """Flags of ``megakd generate``."""

    load: str = option(
        ..., "the model: a folder of checkpoints of 'megakd train', or a Hugging Face folder", common=True
    )
    prompt: list[str] = option([], "texts to continue, each in quotes", common=True)
    prompts_file: str | None = option(
        None,
        "file of texts to continue: one a line, or JSON lines with a key prompt or text if its name ends in .jsonl",
        common=True,
    )
    output: str | None = option(
        None,
        "file for JSON lines, in the order of the prompts: prompt, text, tokens, log_probs, finish (stop or length)",
        common=True,
    )
    num_tokens_to_generate: int = option(100, "most tokens that are written behind a prompt", common=True)
    temperature: float | None = option(
        None,
        "divisor of the logits; 0 takes the most probable token each time (default: 0, or 1 with --top-k or --top-p)",
        common=True,
    )
    top_k: int = option(0, "number of the most probable tokens that can be drawn; 0: all", common=True)
    top_p: float = option(
        1.0, "share of the mass: the fewest most probable tokens that reach it can be drawn", common=True
    )
    seed: int = option(1234, "seed of the draws", common=True)
    add_bos_token: bool | None = option(
        None, "begin every prompt with the begin-of-text token (default: as the tokenizer's own template does)"
    )
    ignore_eod: bool = option(False, "write on behind the end of a document")
    micro_batch_size: int = option(8, "prompts that go through the model together", common=True)
    tensor_model_parallel_size: int = option(1, "ranks that share one layer (TP)", common=True)
    pipeline_model_parallel_size: int = option(1, "pipeline stages (PP)", common=True)
    distributed_timeout_minutes: float = option(10.0, "minutes after which a waiting collective is an error")
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)")
    seq_length: int | None = option(
        None, "most tokens of a prompt with its text (default: the sequence length that the model was trained with)"
    )
    tokenizer_type: TokenizerType | None = option(None, "type of the tokenizer, where the checkpoint records none")
    tokenizer_model: str | None = option(None, "file or folder of the tokenizer, if it has moved or is not recorded")
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer, where the checkpoint records none")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "implementation of the model's layers"
    )
    bf16: bool | None = option(None, "run the model in bfloat16 (default: as it was trained)")
    model_config: str | None = option(
        None,
        "YAML that describes the model, as in the student's part of a training run, for a checkpoint that does not "
        "(plain megatron-core)",
    )
    log_interval: float = option(10.0, "seconds between progress lines, with several prompts")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("num_tokens_to_generate", "micro_batch_size", "seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 1e6:
            raise UsageError(f"--temperature is {self.temperature}; expected 0 (no draws) or more")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; expected a number of tokens, 0 for all")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; expected a share above 0, up to 1")
        if self.temperature == 0 and (self.top_k > 1 or self.top_p < 1):
            raise UsageError(
                "--temperature 0 takes the most probable token, so that --top-k and --top-p have nothing to cut: leave "
                "them out, or set a temperature above 0"
            )
        if self.log_interval < 0:
            raise UsageError(f"--log-interval is {self.log_interval}; expected 0 or more")
        if not self.prompt and self.prompts_file is None:
            raise UsageError("nothing to continue: --prompt TEXT, or --prompts-file FILE")
        if self.prompt and self.prompts_file is not None:
            raise UsageError("--prompt and --prompts-file: one of them")
        self.parallel().validate()

    @property
    def drawn_at(self) -> float | None:
        """Temperature of the draws; None for the most probable token each time."""
        if self.temperature is None:
            return 1.0 if self.top_k or self.top_p < 1 else None
        return self.temperature or None

    def parallel(self) -> ParallelConfig:
        """The model's layout."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            distributed_timeout_minutes=self.distributed_timeout_minutes,
        )

    def described_shape(self) -> ModelShape | None:
        """Shape that ``--model-config`` describes; None without the flag."""
        return None if self.model_config is None else read_shape(self.model_config, "--model-config")
