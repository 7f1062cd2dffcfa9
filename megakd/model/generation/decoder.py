"""A model that reads tokens piece by piece and keeps the keys and values of those before, across pipeline stages.

Axes: ``B`` sequences, ``S`` tokens of one piece, ``H`` hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.errors import UsageError
from megakd.model.gpt import HiddenGPTModel
from megakd.parallel import Groups

# isort: split
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class Decoder:
    """One copy of a model; every rank that holds a part of it makes one and calls it alike.

    model: this rank's stage. Interleaved stages, context parallelism and sequence parallelism are refused: a piece of
    one token cannot be split.

    Raises:
        UsageError: the layout has one of these.
    """

    def __init__(self, model: HiddenGPTModel, groups: Groups) -> None:
        parallel = groups.parallel
        if parallel.interleaved or parallel.sequence_parallel or parallel.context_parallel_size > 1:
            raise UsageError(
                "generating text with sequence parallelism, context parallelism or interleaved stages: tokens are read "
                "one by one, which cannot be split; leave these flags out"
            )
        self._model = model.eval()
        self._groups = groups
        self._messages = P2PCommunicator(groups.collection.pp, model.config) if _staged(groups) else None
        self._context: StaticInferenceContext | None = None

    def start(self, batch_size: int, max_length: int) -> None:
        """Forget everything; make room for ``batch_size`` sequences of ``max_length`` tokens.

        The room is ``2 * max_length * batch_size * groups * head width`` numbers a layer, divided over TP.
        """
        self._context = StaticInferenceContext(batch_size, max_length)

    @torch.no_grad()
    def read(self, tokens_BS: Tensor) -> Tensor | None:
        """Read the next tokens of all sequences: several at first, then one each time.

        Returns the hidden states behind the last of them, ``[B, H]``, on the last stage; None on other stages.
        """
        assert self._context is not None
        batch, length = tokens_BS.shape
        assert length == 1 or self._context.sequence_len_offset == 0, "later pieces have one token"
        first, last = self._groups.is_first_stage, self._groups.is_last_stage
        if self._messages is not None:
            shape = (length, batch, self._model.config.hidden_size)
            self._model.set_input_tensor(self._messages.recv_forward(shape, first))
        hidden_SBH: Tensor = self._model(tokens_BS, None, None, inference_context=self._context)
        self._context.increment_sequence_len_offset(length)
        if self._messages is not None:
            self._messages.send_forward(hidden_SBH, last)
        return hidden_SBH[-1] if last else None


def _staged(groups: Groups) -> bool:
    return groups.parallel.pipeline_model_parallel_size > 1
