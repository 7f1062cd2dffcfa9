"""What a token weighs in each term of the loss, decided here alone, and the loss of one microbatch.

Axes: B microbatch, S sequence, T = S x B flattened tokens in megatron's order (sequence first), H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megakd.losses.head import HeadOutput, KDTerm, VocabShard, head_loss
from megakd.parallel import Groups
from megakd.targets import Targets
from megakd.train.config import ObjectiveConfig

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class Objective:
    """loss = (1 - alpha) · LM + alpha · KD, each a sum over the tokens that the loss mask keeps.

    Pre-training distillation, arXiv 2410.16215, equation 1. Without a teacher alpha is 0. The mean over the tokens of
    the whole global batch is taken outside, once the batch is complete.
    """

    alpha: float
    term: KDTerm | None
    shard: VocabShard
    sequence_parallel: bool
    implementation: Literal["auto", "reference", "native"] = "auto"
    chunk_bytes: int = 128 << 20

    def __call__(
        self, hidden_SBH: Tensor, weight_vH: Tensor, labels_SB: Tensor, mask_SB: Tensor, targets: Targets | None
    ) -> HeadOutput:
        """The weighted sum over this microbatch, differentiable, and every term a token.

        hidden_SBH: the last stage's output; under sequence parallelism ``[S / TP, B, H]``.
        """
        if self.sequence_parallel:
            # its backward reduce-scatters the partial gradients of the ranks
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        mask_T = mask_SB.reshape(-1).to(torch.float32)
        with_teacher = self.term is not None and targets is not None
        return head_loss(
            hidden_SBH.reshape(-1, hidden_SBH.shape[-1]),
            weight_vH,
            labels_SB.reshape(-1),
            shard=self.shard,
            lm_weight_T=mask_T * (1.0 - self.alpha) if with_teacher else mask_T,
            kd_weight_T=mask_T * self.alpha if with_teacher else None,
            kd=self.term if with_teacher else None,
            targets=targets,
            hidden_grad="partial" if self.sequence_parallel else "all_reduce",
            implementation=self.implementation,
            chunk_bytes=self.chunk_bytes,
        )


def make_objective(
    config: ObjectiveConfig, groups: Groups, *, vocab_size: int, padded_vocab_size: int, with_teacher: bool
) -> Objective:
    """The objective for this rank's slice of the vocabulary."""
    rows = padded_vocab_size // groups.parallel.tensor_model_parallel_size
    shard = VocabShard(
        start=groups.tensor_rank * rows,
        num_rows=rows,
        vocab_size=vocab_size,
        group=groups.tensor if groups.parallel.tensor_model_parallel_size > 1 else None,
    )
    term = None
    if with_teacher:
        term = KDTerm(
            divergence=config.kd_divergence,
            temperature=config.kd_temperature,
            temperature_on=config.kd_temperature_on,
            scale_by_temperature_squared=config.kd_scale_by_temperature_squared,
        )
    return Objective(
        alpha=config.kd_alpha if with_teacher else 0.0,
        term=term,
        shard=shard,
        sequence_parallel=groups.parallel.sequence_parallel,
        implementation=config.loss_implementation,
        chunk_bytes=config.head_chunk_mbytes << 20,
    )
