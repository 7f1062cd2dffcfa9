"""What a teacher says about one microbatch: values only, no model and no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as its hidden states and this rank's rows of its output weight.

    The head multiplies the two chunk by chunk, so that no ``[T, V]`` tensor of teacher logits ever exists.

    hidden_TH: ``[T, H_teacher]``, the teacher's hidden states after its last norm, in the student's token order.
    weight_vH: ``[v, H_teacher]``, the teacher's output weight for the same vocabulary rows as the student's shard.
    """

    hidden_TH: Tensor
    weight_vH: Tensor


Targets = DenseTargets
