"""Log-likelihoods of continuations under a frozen model, shared out over its copies.

Axes: ``S`` sequence, ``B`` microbatch, ``T`` = S x B tokens, sequence first.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.data.loader import Microbatch
from megakd.errors import CorruptError, UsageError
from megakd.losses.kernels.choose import Implementation
from megakd.losses.read import read_head
from megakd.losses.vocab_parallel import VocabShard
from megakd.parallel import Groups
from megakd.pipeline.evaluate.requests import Likelihood
from megakd.pipeline.frozen.batches import AlikeMicrobatches, MicrobatchPlan, alike_plans, plan_microbatches
from megakd.pipeline.frozen.model import in_flight
from megakd.targets import DenseTargets
from megakd.teachers.model_teacher import ModelTeacher
from megakd.work.progress import RequestProgress

_PATIENCE = datetime.timedelta(days=7)  # the first rank fetches data sets and builds contexts, while the others wait


@dataclass(frozen=True)
class TokenRequest:
    """Ids of a context, and of the continuation to be scored; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class ContinuationScorer:
    """Scorer of continuations: one model in its layout, its data-parallel copies taking turns.

    model: named in messages. shard: this rank's slice of the vocabulary. max_length: the longest input; what is longer
    is cut from the left, as lm-eval's ``hf`` back-end does. log_interval: seconds between progress lines.
    """

    def __init__(
        self,
        teacher: ModelTeacher,
        groups: Groups,
        shard: VocabShard,
        *,
        model: str,
        max_length: int,
        micro_batch_size: int,
        log_interval: float,
        implementation: Implementation,
        chunk_bytes: int,
    ) -> None:
        self._teacher, self._groups, self._shard = teacher, groups, shard
        self._model, self._micro_batch_size = model, micro_batch_size
        self._implementation, self._chunk_bytes, self._log_interval = implementation, chunk_bytes, log_interval
        self.max_length = max_length

    @torch.no_grad()
    def score(self, requests: Sequence[TokenRequest], *, what: str = "requests") -> list[Likelihood]:
        """Score requests; every rank calls it with the same ones, and gets all answers in their order.

        Which requests meet in one matrix product depends on them and on ``--micro-batch-size`` alone. what: word for
        them in progress lines.

        Raises CorruptError, on every rank, for log-probabilities that are not finite.
        """
        rows = [self._row(request) for request in requests]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        plans = plan_microbatches(
            lengths,
            micro_batch_size=self._micro_batch_size,
            seq_length=self.max_length,
            tensor_size=self._groups.parallel.tensor_model_parallel_size,
        )
        plans = plans[::-1]  # the longest first: what does not fit into memory fails at once, and the rest goes faster
        mine = plans[self._groups.data_rank :: self._groups.data_size]
        progress = RequestProgress(
            len(requests),
            int(lengths.sum()),
            interval=self._log_interval,
            what=what,
            says=self._groups.rank == 0,
            copies=self._groups.data_size,
        )
        answers = np.zeros((len(rows), 2))
        for together in alike_plans(mine, limit=in_flight(self._groups.parallel)):
            batch = AlikeMicrobatches([_microbatch(plan, rows, requests) for plan in together])
            for plan, microbatch, targets in zip(together, batch, self._teacher.targets(batch)):
                assert isinstance(targets, DenseTargets)
                answers[plan.places] = self._answers(microbatch, targets)
            progress.add(
                count=sum(len(plan.places) for plan in together),
                tokens=sum(int(lengths[plan.places].sum()) for plan in together),
            )
        return self._gathered(answers, requests)

    def check(self, requests: Sequence[TokenRequest]) -> None:
        """Raise UsageError for a request without context, or with a continuation that is empty or does not fit."""
        for number, request in enumerate(requests):
            if not (len(request.context) and 0 < len(request.continuation) <= self.max_length):
                raise UsageError(
                    f"request {number} has {len(request.context)} tokens of context and {len(request.continuation)} of "
                    f"continuation; expected at least one of each, and a continuation of at most {self.max_length}: "
                    "--seq-length takes more"
                )

    def _row(self, request: TokenRequest) -> NDArray[np.int64]:
        """Ids of context and continuation, the last ``max_length + 1`` of them."""
        return np.array([*request.context, *request.continuation][-(self.max_length + 1) :], dtype=np.int64)

    def _answers(self, microbatch: Microbatch, targets: DenseTargets) -> NDArray[np.float64]:
        """Return ``[B, 2]``: the sum of the log-probabilities of each continuation, and 1 if all its ids are the best.

        Only continuation tokens go through the head.
        """
        mask_BS = microbatch.loss_mask_BS
        mask_T = torch.from_numpy(mask_BS.T.reshape(-1)).to(self._groups.device)
        labels_T = torch.from_numpy(microbatch.labels_BS.T.reshape(-1)).to(self._groups.device)[mask_T]
        reading = read_head(
            targets.hidden_TH[mask_T],
            targets.weight_vH,
            shard=self._shard,
            ids_T=labels_T,
            top_k=1,
            implementation=self._implementation,
            chunk_bytes=self._chunk_bytes,
        )
        assert reading.log_prob_T is not None and reading.top_ids_TK is not None
        log_probs_SB, best_SB = np.zeros(mask_BS.T.shape), np.ones(mask_BS.T.shape)
        log_probs_SB[mask_BS.T] = reading.log_prob_T.double().cpu().numpy()
        best_SB[mask_BS.T] = (reading.top_ids_TK[:, 0] == labels_T).cpu().numpy()
        return np.stack([log_probs_SB.sum(0), best_SB.min(0)], 1)

    def _gathered(self, answers: NDArray[np.float64], requests: Sequence[TokenRequest]) -> list[Likelihood]:
        """Return the answers of all copies, on every rank: each stands on the last stage of the copy that made it."""
        total = torch.from_numpy(answers).to(self._groups.device)
        if not (self._groups.is_last_stage and self._groups.tensor_rank == 0):
            total.zero_()
        dist.all_reduce(total)
        if not bool(torch.isfinite(total).all()):
            raise CorruptError(
                f"{self._model}: log-likelihoods are not finite: the weights are broken, or the precision (--bf16, "
                "--fp8-format) does not hold them"
            )
        return [
            Likelihood(float(log_prob), bool(best), len(request.continuation))
            for (log_prob, best), request in zip(total.cpu().tolist(), requests)
        ]


class Desk:
    """One desk for requests: the first rank asks, all ranks compute.

    The harness runs on the first rank alone, so that data sets are fetched once and results are written once. The
    others `serve` until it is done.
    """

    def __init__(self, scorer: ContinuationScorer, groups: Groups) -> None:
        self.scorer, self._groups = scorer, groups
        # of its own, on the host: the others wait in it for as long as the first rank builds contexts
        self._control = dist.new_group(backend="gloo", timeout=_PATIENCE) if groups.world_size > 1 else None

    def score(self, requests: Sequence[TokenRequest]) -> list[Likelihood]:
        """Score requests on all ranks. The first rank calls it.

        Raises UsageError for a request that does not fit, before the others hear of it, and CorruptError.
        """
        self.scorer.check(requests)
        self._send(list(requests))
        try:
            return self.scorer.score(requests)
        except CorruptError:
            self._control = None  # all ranks raise it by themselves, and none of them listens any more
            raise

    def serve(self) -> None:
        """Compute what the first rank asks for, until it is done. All other ranks call it.

        Raises the error that the first rank met.
        """
        while (message := self._receive()) is not None:
            if isinstance(message, Exception):
                raise message
            self.scorer.score(message)

    def close(self) -> None:
        """Let the others go on. The first rank calls it."""
        self._send(None)

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the desk on the first rank; where it met an error, the others raise one too."""
        if self._groups.rank > 0:
            return
        if error is None:
            self.close()
        elif hasattr(error, "status"):
            self._send(error)
        else:
            self._send(RuntimeError(f"the first rank failed: {type(error).__name__}: {error}"))

    def _send(self, message: Any) -> None:
        if self._control is not None:
            dist.broadcast_object_list([message], src=0, group=self._control)

    def _receive(self) -> Any:
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=self._control)
        return message[0]


def _microbatch(
    plan: MicrobatchPlan, rows: Sequence[NDArray[np.int64]], requests: Sequence[TokenRequest]
) -> Microbatch:
    """Return a microbatch of requests, padded on the right, whose loss mask keeps the continuations' labels."""
    shape = (len(plan.places), plan.width)
    tokens_BS, labels_BS, mask_BS = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for index, place in enumerate(plan.places.tolist()):
        row = rows[place]
        stop = len(row) - 1
        tokens_BS[index, :stop], labels_BS[index, :stop] = row[:-1], row[1:]
        mask_BS[index, stop - len(requests[place].continuation) : stop] = True
    return Microbatch(tokens_BS, labels_BS, mask_BS, plan.places, np.zeros(len(plan.places), np.int64))
