"""Value head: one number for a whole sample, linear in the mean of a model's last hidden states.

Axes: S sequence, B microbatch, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool(hidden_SBH: Tensor, mask_BS: Tensor) -> Tensor:
    """``[B, H]`` fp32: the mean over the positions where ``mask_BS`` (bool) is true; 0 for a sample that has none."""
    mask_SB1 = mask_BS.t().unsqueeze(-1)
    sums_BH = torch.where(mask_SB1, hidden_SBH.float(), 0.0).sum(0)  # not a product: masked positions may be NaN
    return sums_BH / mask_SB1.sum(0).clamp(min=1)


class ValueHead(torch.nn.Module):
    """``pool(hidden) . weight + bias`` in fp32; 0 for every sample until it is trained."""

    def __init__(self, hidden_size: int, *, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden_SBH: Tensor, mask_BS: Tensor) -> Tensor:
        """``[B]`` fp32: a value for each sample."""
        return (pool(hidden_SBH, mask_BS) * self.weight).sum(-1) + self.bias
