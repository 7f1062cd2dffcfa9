"""An evaluation, in order: the models, held-out data, files of requests, tasks, and what is written about them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megakd.errors import ExitStatus
from megakd.parallel import Groups, init_parallel
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.held_out import measure_held_out
from megakd.pipeline.evaluate.likelihood import Desk, TokenRequest
from megakd.pipeline.evaluate.models import build_models, codec_of, open_desk
from megakd.pipeline.evaluate.preflight import EvaluatePlan
from megakd.pipeline.evaluate.requests import Choices, Likelihood, RequestFile, figures
from megakd.pipeline.evaluate.results import Results, add_to_tensorboard, table, write_results
from megakd.pipeline.evaluate.text import TextCodec
from megakd.work.console import tell


def evaluate(config: EvaluateConfig, plan: EvaluatePlan) -> ExitStatus:
    """Evaluate the model on everything that the flags name. All ranks call it.

    Raises CorruptError for figures that are not finite, UsageError for a task that cannot be run; every rank raises.
    """
    groups = init_parallel(config.parallel(), seed=0)
    started = time.monotonic()
    models = build_models(config, plan, groups)
    _announce(plan, groups)
    held_out = measure_held_out(config, plan, models, groups).as_dict() if plan.blend is not None else None
    requests: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    tasks = None
    if plan.tokenizer is not None:
        codec = codec_of(config, plan.tokenizer)
        with open_desk(config, plan, models, groups) as desk:
            if groups.rank > 0:
                desk.serve()
            else:
                for file, found, answers in _answer(plan.requests, desk, codec):
                    requests[file.name], samples[file.name] = found, answers
                if config.task_names:
                    from megakd.pipeline.evaluate.task_figures import run_tasks  # late: lm-eval is optional, and slow

                    of_tasks = run_tasks(config, desk, codec)
                    tasks, samples = of_tasks.as_dict(), samples | of_tasks.samples
    if groups.rank == 0:
        results = Results(held_out, tasks, requests, samples, time.monotonic() - started)
        path = write_results(config, plan, results)
        if plan.tensorboard is not None:
            add_to_tensorboard(plan.tensorboard, plan.model.record.iteration, results)
        print("\n".join(table(plan, results)))
        tell(f"{path}: written")
    return ExitStatus.COMPLETE


def _announce(plan: EvaluatePlan, groups: Groups) -> None:
    if groups.rank == 0:
        record, parallel = plan.model.record, groups.parallel
        tell(
            f"{record.path}: iteration {record.iteration}, vocabulary {record.vocab_size}, samples of up to "
            f"{plan.seq_length} tokens | TP {parallel.tensor_model_parallel_size}, PP "
            f"{parallel.pipeline_model_parallel_size}, DP {groups.data_size} on {groups.device.type}"
        )


def _answer(
    files: Sequence[RequestFile], desk: Desk, codec: TextCodec
) -> Iterator[tuple[RequestFile, dict[str, Any], list[dict[str, Any]]]]:
    """Score files of requests, all together; yield for each its figures, and the answers to single documents."""
    pairs = [pair for file in files for pair in file.pairs]
    answers = iter(desk.score([TokenRequest(*codec.pair(*pair)) for pair in pairs]) if pairs else [])
    for file in files:
        of_file = list(itertools.islice(answers, len(file.pairs)))
        found = {
            "metrics": figures(file.documents, of_file),
            "path": str(file.path),
            "fingerprint": file.fingerprint,
        }
        rest = iter(of_file)
        yield (
            file,
            found,
            [
                _sample(document, list(itertools.islice(rest, len(document.continuations))))
                for document in file.documents
            ],
        )


def _sample(document: Choices, answers: Sequence[Likelihood]) -> dict[str, Any]:
    return {
        "doc_id": document.doc_id,
        "label": document.label,
        "log_probs": [answer.log_prob for answer in answers],
        "is_greedy": [answer.is_greedy for answer in answers],
        "num_tokens": [answer.num_tokens for answer in answers],
    }
