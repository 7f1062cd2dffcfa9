"""Shape of a model, in Megatron's names: its options, presets and the combinations that are refused. No torch."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.layout import ParallelConfig, is_first_rank, padded_vocab_size
from megakd.model.bounds import check_bounds
from megakd.model.low_precision import check_widths

# MiniPLM: arXiv 2410.17215, Qwen 1.5 architecture; whether embeddings are tied follows from the published parameter
# counts (104M, 203M and 464M leave room for one embedding of 151,936 rows, 1.2B for two). PD: arXiv 2410.16215.
_PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": hidden, "ffn_hidden_size": ffn, "num_layers": layers, "num_attention_heads": heads,
        "num_query_groups": groups, "untie_embeddings_and_output_weights": not tied, "add_qkv_bias": qkv_bias,
    }
    for name, hidden, ffn, layers, heads, groups, tied, qkv_bias in (
        ("miniplm-104m", 512, 1408, 8, 8, 8, True, True),
        ("miniplm-200m", 768, 2112, 12, 12, 12, True, True),
        ("miniplm-300m", 768, 2112, 18, 12, 12, True, True),
        ("miniplm-500m", 1024, 2816, 24, 16, 16, True, True),
        ("miniplm-1.2b", 1536, 4224, 24, 16, 16, False, True),
        ("pd-330m", 1024, 4096, 12, 16, 2, True, False),
        ("pd-670m", 1024, 4096, 24, 16, 2, False, False),
        ("pd-1.9b", 2048, 6912, 24, 16, 2, False, False),
        ("pd-3.8b", 3072, 8192, 28, 24, 8, False, False),
        ("pd-6.8b", 4096, 12800, 28, 32, 8, False, False),
    )
}  # fmt: skip

# Options of a run with a model, which the model itself does not depend on; and those that checkpoints only record.
_OF_A_RUN = (
    "transformer_impl", "bf16", "fp8_format", "fp8_recipe", "fp8_param_gather", "fp8_margin", "fp8_amax_history_len",
    "fp8_amax_compute_algo", "fp4_format", "first_last_layers_bf16", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "moe_token_dispatcher_type", "hidden_dropout",
)  # fmt: skip
_RECORDED_ALONE = (
    "init_method_std", "attention_dropout", "moe_aux_loss_coeff", "make_vocab_size_divisible_by",
)  # fmt: skip
_SCALINGS = ("rope_scaling_factor", "rotary_seq_len_interpolation_factor", "yarn_rotary_scaling_factor")


def preset_layers(name: str) -> int | None:
    """Return the number of layers of a preset; None if there is no preset of that name."""
    layers: int | None = _PRESETS.get(name, {}).get("num_layers")
    return layers


@dataclass
class ModelConfig:
    """Options of a decoder of the Llama/Qwen family: RMSNorm, SwiGLU, RoPE, no bias outside QKV."""

    preset: str | None = option(None, "named shape; explicit sizes override it", common=True)
    num_layers: int | None = option(None, "transformer layers", common=True)
    hidden_size: int | None = option(None, "width of the residual stream", common=True)
    ffn_hidden_size: int | None = option(None, "width of the feed-forward layer (default: 8/3 of hidden, rounded up)")
    num_attention_heads: int | None = option(None, "query heads", common=True)
    num_query_groups: int | None = option(None, "key/value heads (GQA; default: one per query head)")
    kv_channels: int | None = option(None, "width of one head (default: hidden / heads)")
    normalization: Literal["RMSNorm"] = option("RMSNorm", "norm before each block")
    norm_epsilon: float = option(1e-6, "epsilon of the norms")
    add_qkv_bias: bool | None = option(
        None, "bias in the QKV projection, as in Qwen 1.5 and 2 (default: as the preset says, else false)"
    )
    qk_layernorm: bool = option(False, "norm of queries and keys (Qwen 3)")
    rotary_base: float = option(10000.0, "base of the rotary embedding")
    rotary_percent: float = option(1.0, "share of a head that is rotated")
    rope_scaling_factor: float | None = option(
        None, "factor of Llama 3.1's frequency scaling, 8.0 in Llama 3.1 (default: none)"
    )
    rope_scaling_low_freq_factor: float = option(
        1.0, "Llama 3.1's frequency scaling: divisor of the old length whose wavelengths and longer are scaled whole"
    )
    rope_scaling_high_freq_factor: float = option(
        4.0, "Llama 3.1's frequency scaling: divisor of the old length whose wavelengths and shorter stay"
    )
    rope_scaling_original_max_position_embeddings: int = option(
        8192, "Llama 3.1's frequency scaling: the old length, in tokens"
    )
    rotary_seq_len_interpolation_factor: float | None = option(
        None, "divisor of all positions: linear scaling (default: none)"
    )
    yarn_rotary_scaling_factor: float | None = option(None, "factor of YaRN's frequency scaling (default: none)")
    yarn_original_max_position_embeddings: int | None = option(None, "YaRN: the old length, in tokens")
    yarn_beta_fast: float = option(32.0, "YaRN: turns in the old length from which on a frequency stays")
    yarn_beta_slow: float = option(1.0, "YaRN: turns in the old length up to which a frequency is scaled whole")
    yarn_attention_factor: float | None = option(
        None, "YaRN: factor of rotated queries and keys (default: 0.1 ln(factor) + 1)"
    )
    yarn_correction_range_round_to_int: bool = option(
        True, "YaRN: round the ends of the range between both to integers"
    )
    no_rope_freq: int | None = option(
        None, "interval of layers without rotary positions: 4 leaves them out in every fourth (SmolLM 3; default: none)"
    )
    untie_embeddings_and_output_weights: bool | None = option(
        None, "output weight apart from the embedding (default: as the preset says, else true)"
    )
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    hidden_dropout: float = option(0.0, "dropout after attention and feed-forward")
    attention_dropout: float = option(0.0, "dropout of attention weights")
    make_vocab_size_divisible_by: int = option(128, "divisor of the padded vocabulary, times TP")
    num_experts: int | None = option(None, "experts per feed-forward layer (MoE; default: dense)")
    moe_router_topk: int = option(2, "experts a token is sent to")
    moe_router_pre_softmax: bool = option(
        False, "weigh the chosen experts by a softmax over all of them, instead of one over the chosen"
    )
    moe_ffn_hidden_size: int | None = option(None, "width of one expert (default: ffn-hidden-size)")
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = option(
        "alltoall", "messages that bring tokens to experts"
    )
    moe_aux_loss_coeff: float = option(1e-2, "weight of the load-balancing loss")
    moe_shared_expert_intermediate_size: int | None = option(None, "width of the expert that sees every token")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "layers: Transformer Engine's on CUDA where it imports, else megatron-core's local ones", common=True
    )
    bf16: bool = option(False, "bfloat16 parameters and activations", common=True)
    fp8_format: Literal["e4m3", "hybrid"] | None = option(None, "FP8 through Transformer Engine", common=True)
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = option(
        "tensorwise", "FP8 scaling recipe; delayed is at scale 1 in a model that is not trained yet"
    )
    fp8_param_gather: bool = option(False, "parameters kept and gathered in FP8; refused")
    fp8_margin: int = option(0, "delayed scaling: power of 2 that the scale is divided by")
    fp8_amax_history_len: int = option(1, "delayed scaling: steps whose largest values are kept")
    fp8_amax_compute_algo: Literal["most_recent", "max"] = option(
        "most_recent", "delayed scaling: value of those steps that counts, the latest or the largest"
    )
    fp4_format: Literal["e2m1"] | None = option(None, "FP4 through Transformer Engine (Blackwell)")
    first_last_layers_bf16: bool = option(False, "keep the first and the last layer in bf16 under FP8")
    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "activations that are recomputed in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = option(None, "grouping of layers for full recompute")
    recompute_num_layers: int | None = option(None, "layers per recompute group")

    def validate(self) -> None:
        if self.preset is not None and self.preset not in _PRESETS:
            raise UsageError(f"--preset is '{self.preset}'; expected one of {', '.join(_PRESETS)}")
        if (self.fp8_format or self.fp4_format) and self.transformer_impl == "local":
            raise UsageError(
                f"--{'fp8' if self.fp8_format else 'fp4'}-format needs --transformer-impl transformer_engine: "
                "megatron-core's local layers ignore it without an error. Install Transformer Engine with: "
                "pip install --no-build-isolation 'megakd[te]'"
            )
        if self.fp8_format and self.fp4_format:
            raise UsageError("--fp8-format and --fp4-format exclude each other")
        if self.fp8_format and self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise UsageError("--first-last-layers-bf16 needs --fp8-recipe tensorwise or blockwise; it is delayed")
        check_bounds(self)
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 <= p < 1")
        self._check_rope_scaling()
        self._check_experts()
        self._check_recompute()

    def _check_rope_scaling(self) -> None:
        scalings = [f"--{name.replace('_', '-')}" for name in _SCALINGS if getattr(self, name) is not None]
        if len(scalings) > 1:
            raise UsageError(f"{' and '.join(scalings)} exclude each other: a model has one scaling of its positions")
        if self.rope_scaling_high_freq_factor <= self.rope_scaling_low_freq_factor:
            raise UsageError(
                f"--rope-scaling-high-freq-factor is {self.rope_scaling_high_freq_factor}; expected more than "
                f"--rope-scaling-low-freq-factor, {self.rope_scaling_low_freq_factor}"
            )
        if self.yarn_rotary_scaling_factor is not None:
            if self.yarn_original_max_position_embeddings is None:
                raise UsageError("--yarn-rotary-scaling-factor needs --yarn-original-max-position-embeddings N")
            if self.no_rope_freq is not None:
                raise UsageError(
                    "--yarn-rotary-scaling-factor and --no-rope-freq exclude each other: YaRN's factor of queries and "
                    "keys would reach the layers without positions too"
                )

    def _check_experts(self) -> None:
        if self.num_experts is not None and self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise UsageError(
                "--moe-router-topk is 1; expected at least 2: the softmax is over the chosen experts, so that one "
                "alone always weighs 1 and the router learns nothing"
            )
        if self.num_experts is not None and self.moe_router_topk > self.num_experts:
            raise UsageError(
                f"--moe-router-topk {self.moe_router_topk}: a token cannot go to more than the {self.num_experts} "
                "experts of --num-experts"
            )
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            if self.num_experts is None and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} without experts: add --num-experts")
        if not 0 <= self.moe_aux_loss_coeff <= 1e6:
            raise UsageError(f"--moe-aux-loss-coeff is {self.moe_aux_loss_coeff}; expected 0 or more")

    def _check_recompute(self) -> None:
        options = {"--recompute-method": self.recompute_method, "--recompute-num-layers": self.recompute_num_layers}
        given = [flag for flag, value in options.items() if value is not None]
        if self.recompute_granularity == "full" and len(given) < 2:
            raise UsageError(
                "--recompute-granularity full needs --recompute-method uniform or block and --recompute-num-layers N: "
                "how many layers are kept as one input, or recomputed at all"
            )
        if self.recompute_granularity != "full" and given:
            raise UsageError(f"{' and '.join(given)} without --recompute-granularity full")

    def of_checkpoint(self, shape: ModelShape, checkpoint: str) -> ModelShape:
        """Return the shape of a checkpoint's model with the precision, layers and costs that the options here ask for.

        Raises:
            UsageError: an option describes another model than the checkpoint's.
        """
        defaults = ModelConfig()
        values = {name: getattr(self, name) for name in _OF_A_RUN}
        untied = self.untie_embeddings_and_output_weights
        described = {name: getattr(self, name) for name in shape.__dataclass_fields__ if name in self.__dict__}
        described |= {} if untied is None else {"tied": not untied}
        for name, value in described.items():
            if name in _OF_A_RUN or value in (None, getattr(defaults, name, None)) or value == getattr(shape, name):
                continue
            if name in _RECORDED_ALONE:
                values[name] = value
                continue
            flag = "untie-embeddings-and-output-weights" if name == "tied" else name.replace("_", "-")
            raise UsageError(
                f"--{flag} is {untied if name == 'tied' else value}, and the model is that of {checkpoint}, whose "
                f"{name} is {getattr(shape, name)}: leave the flag out, or describe a whole model (--num-layers ...)"
            )
        return dataclasses.replace(shape, **values)

    @property
    def given(self) -> bool:
        """True if the user described a model here."""
        return self.preset is not None or self.num_layers is not None or self.hidden_size is not None

    def resolve(self, role: str) -> ModelShape:
        """Return the finished shape: preset, then explicit keys, then defaults that depend on other keys.

        Raises:
            UsageError: a size is missing or does not divide; the message names role, key and value.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        preset = _PRESETS[self.preset] if self.preset else {}
        values.update({key: value for key, value in preset.items() if values[key] is None})
        sizes = {key: values[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
        missing = [f"--{key.replace('_', '-')}" for key, value in sizes.items() if value is None]
        if missing:
            taken = "; or --load DIR --finetune, which takes the model of a checkpoint or a Hugging Face folder"
            ways = f"--preset: {', '.join(_PRESETS)}{taken if role == 'student' else ''}"
            raise UsageError(f"{role}: missing {', '.join(missing)} (or {ways})")
        if min(sizes.values()) < 1:
            raise UsageError(f"{role}: {sizes}; expected positive sizes")
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if self.kv_channels is None and hidden % heads:
            raise UsageError(
                f"{role}: --hidden-size {hidden} is not a multiple of --num-attention-heads {heads}; set --kv-channels"
            )
        groups = values["num_query_groups"] or heads
        if heads % groups:
            raise UsageError(f"{role}: --num-attention-heads {heads} is not a multiple of --num-query-groups {groups}")
        rotated = int((self.kv_channels or hidden // heads) * self.rotary_percent)
        if rotated < 2 or rotated % 2:
            raise UsageError(
                f"{role}: --kv-channels {self.kv_channels or hidden // heads} (width of one head) x --rotary-percent "
                f"{self.rotary_percent} rotates {rotated} numbers; expected an even number, they turn in pairs"
            )
        ffn = values["ffn_hidden_size"] or (8 * hidden // 3 + 63) // 64 * 64
        untied = values.pop("untie_embeddings_and_output_weights")
        values.update(num_query_groups=groups, ffn_hidden_size=ffn, tied=untied is False)
        values.update(kv_channels=self.kv_channels or hidden // heads, add_qkv_bias=bool(values["add_qkv_bias"]))
        values.update(moe_ffn_hidden_size=self.moe_ffn_hidden_size or ffn)
        del values["preset"]
        return ModelShape(**values)


@dataclass(frozen=True)
class ModelShape:
    """A resolved ``ModelConfig``: every size a number. Checkpoints record it.

    What a model that was imported has beside its options: max_position_embeddings: longest sequence that it was made
    for, in tokens. sliding_window: tokens that its attention sees; longer sequences are refused, because windows are
    not computed here. padded_vocab_size: least rows of the embedding, padding among them, before the divisor.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    normalization: str
    norm_epsilon: float
    add_qkv_bias: bool
    qk_layernorm: bool
    rotary_base: float
    rotary_percent: float
    rope_scaling_factor: float | None
    tied: bool
    init_method_std: float
    hidden_dropout: float
    attention_dropout: float
    make_vocab_size_divisible_by: int
    num_experts: int | None
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_token_dispatcher_type: str
    moe_aux_loss_coeff: float
    moe_shared_expert_intermediate_size: int | None
    transformer_impl: str
    bf16: bool
    fp8_format: str | None
    fp8_recipe: str
    fp8_param_gather: bool
    fp4_format: str | None
    first_last_layers_bf16: bool
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    # with defaults, because older checkpoints do not record them
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: str = "most_recent"
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_max_position_embeddings: int = 8192
    rotary_seq_len_interpolation_factor: float | None = None
    yarn_rotary_scaling_factor: float | None = None
    yarn_original_max_position_embeddings: int | None = None
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attention_factor: float | None = None
    yarn_correction_range_round_to_int: bool = True
    no_rope_freq: int | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    padded_vocab_size: int | None = None
    moe_router_pre_softmax: bool = False

    def rows(self, vocab_size: int, tensor_model_parallel_size: int) -> int:
        """Return the rows of the embedding of ``vocab_size`` ids, padding among them, over so many ranks."""
        return padded_vocab_size(
            max(vocab_size, self.padded_vocab_size or 0),
            divisible_by=self.make_vocab_size_divisible_by,
            tensor_model_parallel_size=tensor_model_parallel_size,
        )

    def check_sequence(self, seq_length: int, role: str) -> None:
        """Refuse sequences that the model sees through a sliding window.

        Raises:
            UsageError: tells both lengths.
        """
        if self.sliding_window is not None and seq_length > self.sliding_window:
            raise UsageError(
                f"{role}: sequences of {seq_length} tokens, and the model has a sliding window of "
                f"{self.sliding_window} (sliding_window): what lies outside it is seen here; --seq-length "
                f"{self.sliding_window} or less computes the same"
            )

    def warn_of_length(self, seq_length: int, role: str) -> None:
        """Warn, on the first rank, of sequences longer than the model was made for. role: begins the warning."""
        if self.max_position_embeddings and seq_length > self.max_position_embeddings and is_first_rank():
            warnings.warn(
                f"{role}: sequences of {seq_length} tokens, and the model was made for {self.max_position_embeddings} "
                "(max_position_embeddings): most models say little of use beyond",
                stacklevel=2,
            )

    def frozen(self, *, transformer_impl: str, bf16: bool, fp8_format: str | None, fp8_recipe: str) -> ModelShape:
        """Return the shape for inference with these weights, in the given precision: no dropout, no FP4.

        Weights are kept wide, not in FP8.
        """
        return dataclasses.replace(
            self,
            transformer_impl=transformer_impl,
            bf16=bf16,
            fp8_format=fp8_format,
            fp8_recipe=fp8_recipe,
            fp8_param_gather=False,
            fp4_format=None,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )

    def check_layout(self, parallel: ParallelConfig, role: str) -> None:
        """Refuse a layout that this shape does not divide into.

        Raises:
            UsageError: heads, groups or layers not divisible, or no widths for FP8; the message shows the arithmetic.
        """
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        for name, value in (
            ("num-attention-heads", self.num_attention_heads),
            ("num-query-groups", self.num_query_groups),
            ("ffn-hidden-size", self.ffn_hidden_size),
        ):
            if value % tensor:
                raise UsageError(
                    f"{role}: --{name} {value} is not a multiple of --tensor-model-parallel-size {tensor} "
                    f"({value} = {tensor} x {value // tensor} + {value % tensor})"
                )
        if self.num_experts:
            shared, expert_tensor = self.moe_shared_expert_intermediate_size, parallel.expert_tensor_parallel_size
            for name, width, flag, size in (
                ("moe-shared-expert-intermediate-size", shared, "tensor-model-parallel-size", tensor),
                ("moe-ffn-hidden-size", self.moe_ffn_hidden_size, "expert-tensor-parallel-size", expert_tensor),
            ):
                if width is not None and width % size:
                    raise UsageError(f"{role}: --{name} {width} is not a multiple of --{flag} {size}")
        check_widths(self, parallel, role)
        stages = pipeline * (parallel.virtual_pipeline_model_parallel_size or 1)
        if self.num_layers % stages:
            raise UsageError(
                f"{role}: --num-layers {self.num_layers} is not a multiple of the {stages} pipeline chunks "
                f"(PP {pipeline} x {parallel.virtual_pipeline_model_parallel_size or 1})"
            )
        layers, group = self.num_layers // stages, self.recompute_num_layers
        if group is not None and (group > layers or (self.recompute_method == "uniform" and layers % group)):
            raise UsageError(
                f"{role}: --recompute-num-layers {group} of the {layers} layers of a pipeline chunk: expected at most "
                "as many, with --recompute-method uniform a divisor"
            )
        experts = parallel.expert_model_parallel_size
        if experts > 1 and (self.num_experts is None or self.num_experts % experts):
            raise UsageError(
                f"{role}: --num-experts {self.num_experts} is not a multiple of --expert-model-parallel-size {experts}"
            )
        if self.num_experts and tensor > 1:
            if not parallel.sequence_parallel:
                raise UsageError(f"{role}: experts with --tensor-model-parallel-size {tensor} need --sequence-parallel")
            if experts == 1 and parallel.expert_tensor_parallel_size == 1:
                raise UsageError(
                    f"{role}: experts with --tensor-model-parallel-size {tensor}, --expert-model-parallel-size 1 and "
                    "--expert-tensor-parallel-size 1 train wrong: megatron-core does not add up the experts' gradients "
                    "over tensor-parallel ranks then. Set --expert-model-parallel-size > 1"
                )

    def weight_names(self) -> set[str]:
        """Return the names of the weights in a checkpoint of this shape (layers are stacked), without experts."""
        attention = ["linear_qkv.weight", "linear_qkv.layer_norm_weight", "linear_proj.weight"]
        attention += ["linear_qkv.bias"] if self.add_qkv_bias else []
        attention += ["q_layernorm.weight", "k_layernorm.weight"] if self.qk_layernorm else []
        names = {f"decoder.layers.self_attention.{name}" for name in attention}
        if not self.num_experts:
            feed_forward = ("linear_fc1.weight", "linear_fc1.layer_norm_weight", "linear_fc2.weight")
            names |= {f"decoder.layers.mlp.{name}" for name in feed_forward}
        names |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
        return names if self.tied else names | {"output_layer.weight"}

    @property
    def flops_per_token_forward(self) -> float:
        """Floating-point operations of one forward pass a token, without attention scores and the head.

        2 x the matmul parameters of all layers that one token passes through (a multiply-add counts as two).
        """
        heads = self.num_attention_heads * self.kv_channels
        attention = self.hidden_size * (2 * heads + 2 * self.num_query_groups * self.kv_channels)
        if self.num_experts:
            width = self.moe_router_topk * self.moe_ffn_hidden_size + (self.moe_shared_expert_intermediate_size or 0)
            feed_forward = 3 * self.hidden_size * width + self.hidden_size * self.num_experts
        else:
            feed_forward = 3 * self.hidden_size * self.ffn_hidden_size
        return 2.0 * self.num_layers * (attention + feed_forward)

    def flops_forward(self, *, seq_length: int, vocab_size: int) -> float:
        """Floating-point operations of one forward pass over one token of a causal sequence, the head included."""
        scores = 2.0 * self.num_layers * self.num_attention_heads * self.kv_channels * seq_length
        return self.flops_per_token_forward + scores + 2.0 * self.hidden_size * vocab_size
