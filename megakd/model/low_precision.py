"""Refusal of FP8 and FP4 that cannot run: weights kept in FP8, widths that do not fill a block, cards without it.

Transformer Engine finds the widths and the card out in the first forward pass, after everything is loaded. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.errors import UsageError

if TYPE_CHECKING:
    from megakd.layout import ParallelConfig
    from megakd.model.config import ModelShape

# Multiples that Transformer Engine asks of a linear layer's widths: 16 numbers for FP8 and FP4 products, 32 where each
# block of 32 has a scale. Rows of its input: multiples of 8, of the block where there are blocks along them.
_WIDTHS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "fp4": 16}
_ROWS = {"delayed": 8, "tensorwise": 8, "blockwise": 8, "mxfp8": 32, "fp4": 16}
# Compute capability from which a card has the products: Ada, Hopper, Blackwell.
_CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0), "fp4": (10, 0)}


def check_widths(shape: ModelShape, parallel: ParallelConfig, role: str) -> None:
    """Refuse a model whose linear layers have no FP8 or FP4 products in a layout.

    Raises:
        UsageError: names the width of a rank, the option that it comes from and the multiple that is needed.
    """
    if shape.fp8_param_gather:
        raise UsageError(
            f"{role}: --fp8-param-gather is refused: the optimizer would take its fp32 weights from what the FP8 ones "
            "were before they were set, uninitialised memory. Drop it: weights are kept and gathered in bf16, and "
            "products are in FP8 all the same"
        )
    recipe = _recipe(shape)
    if recipe is None:
        return
    tensor, head = parallel.tensor_model_parallel_size, shape.kv_channels
    heads, groups = shape.num_attention_heads // tensor, shape.num_query_groups // tensor
    widths = {
        "--hidden-size": shape.hidden_size,
        "--num-attention-heads x --kv-channels": heads * head,
        "(--num-attention-heads + 2 x --num-query-groups) x --kv-channels": (heads + 2 * groups) * head,
    }
    if shape.num_experts:
        widths["--moe-ffn-hidden-size"] = shape.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
        if shape.moe_shared_expert_intermediate_size:
            widths["--moe-shared-expert-intermediate-size"] = shape.moe_shared_expert_intermediate_size // tensor
    else:
        widths["--ffn-hidden-size"] = shape.ffn_hidden_size // tensor
    for flag, width in widths.items():
        if width % _WIDTHS[recipe]:
            raise UsageError(
                f"{role}: {flag} is {width} on a rank; expected a multiple of {_WIDTHS[recipe]} for {_said(shape)}: "
                "change the width or the tensor-parallel size, or drop the format"
            )


def check_rows(
    shape: ModelShape, parallel: ParallelConfig, role: str, *, micro_batch_size: int, seq_length: int
) -> None:
    """Refuse microbatches whose tokens on a rank do not fill the blocks of FP8 or FP4.

    Raises:
        UsageError: shows how many tokens a rank has and the multiple that is needed.
    """
    recipe = _recipe(shape)
    if recipe is None:
        return
    ranks = parallel.context_parallel_size
    ranks *= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    rows = micro_batch_size * seq_length // ranks
    if rows % _ROWS[recipe]:
        raise UsageError(
            f"{role}: --micro-batch-size {micro_batch_size} x --seq-length {seq_length} over {ranks} ranks are {rows} "
            f"tokens; expected a multiple of {_ROWS[recipe]} for {_said(shape)}: change --micro-batch-size, or drop "
            "the format"
        )


def check_card(shape: ModelShape, capability: tuple[int, int], card: str) -> None:
    """Refuse a format or recipe that a card has no products for.

    capability: CUDA's compute capability of the card, (9, 0) for Hopper. card: its name, for the message.

    Raises:
        UsageError: names both capabilities and what the card can do.
    """
    recipe = _recipe(shape)
    if recipe is None or capability >= _CAPABILITIES[recipe]:
        return
    able = [name for name, least in _CAPABILITIES.items() if name != "fp4" and capability >= least]
    way = f"it has --fp8-format with --fp8-recipe {' or '.join(able)}" if able else "it has no FP8: drop the format"
    needed, there = (".".join(map(str, numbers)) for numbers in (_CAPABILITIES[recipe], capability))
    raise UsageError(f"{_said(shape)} needs compute capability {needed}, and {card} has {there}: {way}")


def _recipe(shape: ModelShape) -> str | None:
    return "fp4" if shape.fp4_format else shape.fp8_recipe if shape.fp8_format else None


def _said(shape: ModelShape) -> str:
    """Return the flags that ask for the format."""
    if shape.fp4_format:
        return f"--fp4-format {shape.fp4_format}"
    return f"--fp8-format {shape.fp8_format} --fp8-recipe {shape.fp8_recipe}"
