"""megatron-core's GPTModel, built to end at hidden states: the head belongs to the loss.

A model here is a list of chunks, one for each virtual pipeline stage of this rank (one chunk without interleaving).
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd import cpu
from megakd.errors import UsageError
from megakd.model.attention import SdpaCoreAttention
from megakd.model.config import ModelShape
from megakd.model.low_precision import check_card
from megakd.model.rotary import ScaledRotaryEmbedding, layers_without_positions, softmax_scale
from megakd.parallel import Groups

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


class HiddenGPTModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage returns the final hidden states ``[S, B, H]`` (after the last norm), not logits."""

    post_process: bool

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """Return this rank's rows ``[v, H]`` of the output weight; only for a chunk that ends the model."""
        if self.share_embeddings_and_output_weights:
            return cast(Tensor, self.shared_embedding_or_output_weight())
        return cast(Tensor, self.output_layer.weight)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return megatron's sharded tensors, also of a model without its head, which language_module.py:302 expects."""
        ends_here = self.post_process
        self.post_process = ends_here and self.output_layer is not None
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = ends_here


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism, which megatron's own (torch_norm.py:32) refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device="cuda" if not cpu.needed() else "cpu")
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.shape, self.weight, self.eps)


def resolve_transformer_impl(shape: ModelShape) -> str:
    """Return ``local`` or ``transformer_engine``, as the configuration asks and this machine allows.

    ``auto`` is Transformer Engine only if the device is CUDA and the import succeeds.

    Raises:
        UsageError: Transformer Engine or FP8/FP4 is asked for and cannot be used, or the card lacks the format; the
            message has the reason.
    """
    reason = _transformer_engine_failure()
    wants_low_precision = shape.fp8_format or shape.fp4_format
    if shape.transformer_impl == "transformer_engine" or wants_low_precision:
        if reason:
            asked = "--fp8-format / --fp4-format" if wants_low_precision else "--transformer-impl transformer_engine"
            raise UsageError(
                f"{asked} needs Transformer Engine, which cannot be used here: {reason}. On a CUDA machine install it "
                "with: pip install --no-build-isolation 'megakd[te]'; without it drop the flag"
            )
        if wants_low_precision:
            check_card(shape, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
        return "transformer_engine"
    return "local" if shape.transformer_impl == "local" or reason else "transformer_engine"


def build_model(
    shape: ModelShape,
    groups: Groups,
    *,
    vocab_size: int,
    seq_length: int,
    with_head: bool = True,
) -> list[HiddenGPTModel]:
    """Build this rank's chunks of a model; their weights are not set yet.

    vocab_size: the true vocabulary; its rows are padded for the layout. with_head: allocate the output weight on the
    last stage (a teacher's head is on the student's last stage instead).
    """
    chunks = groups.parallel.virtual_pipeline_model_parallel_size
    shape.check_sequence(seq_length, "the model")
    rows = shape.rows(vocab_size, groups.parallel.tensor_model_parallel_size)
    with warnings.catch_warnings():
        # megatron warns of its own default (transformer_config.py:1705)
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        config = transformer_config(shape, groups, training=with_head)
    models = []
    for stage in range(chunks) if chunks else [None]:
        model = HiddenGPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(shape, config, groups, stage),
            vocab_size=rows,
            max_sequence_length=seq_length,
            pre_process=groups.has_input(stage),
            post_process=groups.has_output(stage),
            share_embeddings_and_output_weights=shape.tied and with_head,
            position_embedding_type="rope",
            rotary_percent=shape.rotary_percent,
            rotary_base=shape.rotary_base,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        model.rotary_pos_emb = ScaledRotaryEmbedding(shape, groups)
        if not with_head and groups.has_output(stage):
            model.output_layer = None
        _mark_split_weights(model)
        models.append(model)
    return models


def partition_dim(name: str) -> int | None:
    """Return the axis along which megatron splits a matrix over tensor-parallel ranks; None for a whole matrix."""
    if any(part in name for part in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")):
        return 0
    return 1 if "linear_proj" in name or "linear_fc2" in name else None


def _mark_split_weights(model: HiddenGPTModel) -> None:
    """Mark split weights for the gradient norm; megatron does so only when it initialises them (layers.py:855)."""
    for name, weight in model.named_parameters():
        dim = partition_dim(name)
        if weight.dim() == 2 and dim is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def transformer_config(shape: ModelShape, groups: Groups, *, training: bool) -> TransformerConfig:
    """Return megatron's configuration of this shape in this layout."""
    parallel, on_cpu = groups.parallel, groups.device.type == "cpu"
    dtype = torch.bfloat16 if shape.bf16 else torch.float32
    engine = resolve_transformer_impl(shape) == "transformer_engine"
    experts: dict[str, Any] = {}
    if shape.num_experts:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_pre_softmax": shape.moe_router_pre_softmax,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_token_dispatcher_type": shape.moe_token_dispatcher_type,
            "moe_aux_loss_coeff": shape.moe_aux_loss_coeff if training else 0.0,
            "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
            "moe_grouped_gemm": False,
        }
    if shape.fp8_format:
        experts |= {
            "fp8": shape.fp8_format,
            "fp8_recipe": shape.fp8_recipe,
            "fp8_param": shape.fp8_param_gather,
            "fp8_margin": shape.fp8_margin,
            "fp8_amax_history_len": shape.fp8_amax_history_len,
            "fp8_amax_compute_algo": shape.fp8_amax_compute_algo,
            "first_last_layers_bf16": shape.first_last_layers_bf16,
        }
    if shape.fp4_format:
        experts |= {"fp4": shape.fp4_format}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        softmax_scale=softmax_scale(shape),
        no_rope_freq=layers_without_positions(shape),
        init_method_std=shape.init_method_std,
        hidden_dropout=shape.hidden_dropout if training else 0.0,
        attention_dropout=shape.attention_dropout if training else 0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        overlap_p2p_comm=parallel.p2p_overlapped,
        batch_p2p_comm=not parallel.p2p_overlapped,
        deallocate_pipeline_outputs=parallel.deallocate_pipeline_outputs,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=shape.bf16,
        perform_initialization=False,  # set_initial_weights does it, equally for every layout
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # the mean is over the tokens of the whole global batch
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        apply_rope_fusion=engine,
        # megatron's output layer refuses it without apex (tensor_parallel/layers.py:925); `wrap_student` gives it to
        # Transformer Engine's layers, which need no apex
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=shape.recompute_granularity if training else None,
        recompute_method=shape.recompute_method if training else None,
        recompute_num_layers=shape.recompute_num_layers if training else None,
        **experts,
    )


def _layer_spec(shape: ModelShape, config: TransformerConfig, groups: Groups, stage: int | None) -> Any:
    if resolve_transformer_impl(shape) == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=shape.num_experts, moe_grouped_gemm=False, qk_layernorm=shape.qk_layernorm
        )
    spec: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=shape.num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=shape.qk_layernorm,
        normalization=shape.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=stage, pp_rank=groups.pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)


def _transformer_engine_failure() -> str | None:
    """Return the reason why Transformer Engine cannot be used here; None if it can."""
    if cpu.needed():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError and OSError: built for another CUDA or torch
        return f"its import fails with: {error}"
    return None
