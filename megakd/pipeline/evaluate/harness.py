"""A model of ours under lm-eval: log-likelihoods for its tasks, by the rules of its own ``hf`` back-end.

Works with lm-eval 0.4.9 to 0.4.13. Importing this file registers the model as ``megakd``.
"""

from __future__ import annotations

import atexit
import dataclasses
from collections.abc import Sequence
from typing import Any

from megakd.config.tree import from_dict, validate
from megakd.config.values import Plain
from megakd.errors import UsageError
from megakd.layout import world_size
from megakd.parallel import init_parallel
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.likelihood import Desk, TokenRequest
from megakd.pipeline.evaluate.models import build_models, codec_of, open_desk
from megakd.pipeline.evaluate.preflight import check_evaluate
from megakd.pipeline.evaluate.text import TextCodec

# isort: split
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The harness's view of a model: one rank of one, whatever layout computes behind the desk.

    The harness runs on the first rank alone, so its own distribution of documents over ranks stays out of the way.
    """

    backend = "causal"

    def __init__(self, desk: Desk, codec: TextCodec) -> None:
        super().__init__()
        self._desk, self._codec = desk, codec

    @property
    def eot_token_id(self) -> int:
        """Id that ends a document, or the prefix token where the tokenizer names none."""
        eod = self._codec.tokenizer.eod
        return self._codec.prefix_token if eod is None else eod

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context."""
        return self._codec.prefix_token

    @property
    def max_length(self) -> int:
        """Longest input of the model, in tokens."""
        return self._desk.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text as ids; add_special_tokens: None for what the model's tokenizer does by itself."""
        return self._codec.encode(string, add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the longest input, every token scored once."""
        windows: list[TokenRequest] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            pieces = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            mine = [TokenRequest(*make_disjoint_window(piece)) for piece in pieces]
            windows += mine
            counts.append(len(mine))
        answers = iter(self._desk.score(windows) if windows else [])
        totals = [sum(next(answers).log_prob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse tasks that generate text. Raises UsageError."""
        names = sorted({str(getattr(request, "task_name", None) or "unnamed") for request in requests})
        raise UsageError(
            f"--tasks {','.join(names)}: a task that lets the model write (generate_until); log-likelihood tasks are "
            "scored here. Export the model to a Hugging Face folder and run lm-eval's own back-end for it"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = self._desk.score([TokenRequest(context, ids) for _, context, ids in requests])
        pairs = [(answer.log_prob, answer.is_greedy) for answer in answers]
        for (text, _, _), pair in zip(requests, pairs):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, pair)
        return pairs


@register_model("megakd")
class MegakdLM(HarnessModel):
    """Model ``megakd`` of lm-eval's own command: ``--model megakd --model_args load=FOLDER,iteration=100``.

    Arguments are flags of ``megakd evaluate`` about the model, with underscores. Under torchrun all ranks but the first
    compute until the harness is done, and end there, so that results are written once on any number of machines.
    """

    def __init__(
        self,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **flags: Any,
    ) -> None:
        """batch_size: samples that go through the model together, as ``micro_batch_size``; ``auto`` for its default.

        Raises UsageError for arguments that are no flags, and for a model that is not there.
        """
        if str(batch_size).isdecimal():
            flags.setdefault("micro_batch_size", int(str(batch_size)))
        config = config_of_arguments(flags)
        plan = check_evaluate(config, world_size())
        groups = init_parallel(config.parallel(), seed=0)
        desk = open_desk(config, plan, build_models(config, plan, groups), groups)
        if groups.rank > 0:
            desk.serve()
            raise SystemExit(0)
        atexit.register(desk.close)
        assert plan.tokenizer is not None
        super().__init__(desk, codec_of(config, plan.tokenizer))


def config_of_arguments(flags: dict[str, Any]) -> EvaluateConfig:
    """Return the configuration that ``--model_args`` say. Raises UsageError for arguments that are no flags."""
    ours = {field.name for field in dataclasses.fields(EvaluateConfig)}
    unknown = sorted(set(flags) - ours)
    if unknown or "load" not in flags:
        raise UsageError(
            f"--model_args {','.join(unknown) or 'without load'}: expected load=FOLDER and flags of 'megakd evaluate' "
            "with underscores, such as iteration, tensor_model_parallel_size, seq_length"
        )
    # the harness has read numbers and booleans already: the option's own type reads the words again
    tree = {key: Plain(str(value), nulls=("None",)) for key, value in flags.items()}
    config = from_dict(EvaluateConfig, {**tree, "tasks": ["of-the-harness"]})
    validate(config)
    return config
