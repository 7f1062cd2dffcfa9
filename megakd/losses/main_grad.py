"""Addition of the output weight's gradient to megatron's gradient buffers, without a copy in between.

Either after the sweep, in the backward, for any incoming gradient; or by the sweep itself, chunk by chunk, where the
incoming gradient is known to be 1: that spares a tensor as wide as the buffer and a pass over both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK_BYTES = 16 << 20


def main_grad_of(weight_vH: Tensor) -> Tensor | None:
    """Return megatron's gradient buffer ``[v, H]`` of a weight; None if there is none, or a narrower one."""
    main_grad_vH: Tensor | None = getattr(weight_vH, "main_grad", None)
    if main_grad_vH is None or not hasattr(weight_vH, "grad_added_to_main_grad"):
        return None
    return main_grad_vH if main_grad_vH.dtype == torch.promote_types(weight_vH.dtype, torch.float32) else None


def claim_main_grad(weight_vH: Tensor) -> Tensor | None:
    """Tell megatron's hook that the gradient is in ``main_grad`` already, and return the one for autograd to pass on.

    See `add_to_main_grad`.
    """
    parameter: Any = weight_vH
    parameter.grad_added_to_main_grad = True
    return None if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like(weight_vH)


def add_to_main_grad(weight_vH: Tensor, d_weight_vH: Tensor, grad: Tensor) -> Tensor | None:
    """Add ``grad · d_weight_vH`` to ``weight_vH.main_grad`` if megatron has put one there; return autograd's gradient.

    megatron's hook adds the gradient that autograd accumulates to ``main_grad`` (distributed_data_parallel.py,
    megatron-core 0.16), unless ``grad_added_to_main_grad`` says that it is there already: then autograd's gradient must
    exist to fire the hook, but nobody reads it. A weight tied to an embedding of the same stage (``zero_out_wgrad``)
    gets the embedding's gradient through autograd too, which fires the hook, so None is returned. Without such a buffer
    the product is returned, rounded to the weight's dtype as it is written.
    """
    parameter: Any = weight_vH  # with the attributes that megatron adds
    if getattr(parameter, "main_grad", None) is None or not hasattr(parameter, "grad_added_to_main_grad"):
        return _scaled(d_weight_vH, grad, weight_vH.dtype)
    main_grad_vH: Tensor = parameter.main_grad
    main_grad_vH.addcmul_(d_weight_vH.to(main_grad_vH.dtype), grad.to(main_grad_vH.dtype))
    return claim_main_grad(weight_vH)


def _scaled(d_weight_vH: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad · d_weight_vH`` rounded to ``dtype``, a block at a time, for torch would make a second wide tensor."""
    scaled_vH = torch.empty_like(d_weight_vH, dtype=dtype)
    block = max(1, _BLOCK_BYTES // (d_weight_vH.shape[1] * d_weight_vH.element_size()))
    for start in range(0, d_weight_vH.shape[0], block):
        scaled_vH[start : start + block] = d_weight_vH[start : start + block] * grad
    return scaled_vH
