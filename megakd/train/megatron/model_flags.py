"""Megatron-LM's flags of the model and of the precision of its computations."""

from __future__ import annotations

from megakd.config.command_line import Line
from megakd.train.megatron.verdicts import Entry, Reading, flags_of, refused, same, same_for, same_if, words

_FAMILY = (
    "models here are decoders of the Llama and Qwen family: RMSNorm, SwiGLU, rotary positions, no bias outside QKV"
)
_NO_MLA = "there is no multi-latent attention here; attention is multi-head or grouped (--num-query-groups)"
_NO_MTP = "there is no multi-token prediction here; the loss is of the next token"
_NO_LAYERS = "every layer is the same here; there are no hybrid or heterogeneous ones"
_ROUTER = "the router takes a softmax and the largest --moe-router-topk logits, with an auxiliary loss alone"
_NO_DROP = "no token is dropped here; every expert takes all that are sent to it"


def _positions(words: tuple[str, ...], line: Line) -> str:
    length = line.number("--seq-length", "data.seq_length")
    most = int(words[0]) if words[0].isascii() and words[0].isdigit() else None
    if most is None:
        return f"'{words[0]}' is not a whole number"
    if length is not None and length > most:
        return f"{most} positions are fewer than --seq-length {length}"
    return ""


def _groups(words: tuple[str, ...], line: Line) -> str:
    if line.has("--num-query-groups") or "student.num_query_groups" in line.files or line.has("--preset"):
        return ""
    return "say how many: --num-query-groups N (Megatron's default is 1; here it is one group a head)"


def _rope_scaling(words: tuple[str, ...], line: Line) -> Reading:
    given = line.has("--rope-scaling-factor") or line.files.get("student.rope_scaling_factor") is not None
    return Reading([] if given else flags_of(["--rope-scaling-factor", "8.0"]))


MODEL: tuple[Entry, ...] = (
    same_if("--max-position-embeddings", "rotary positions have no table, so no size", _positions, takes="one"),
    same_for("--position-embedding-type", "rope", "positions are rotary", f"positions are rotary here: {_FAMILY}"),
    same("--use-rotary-position-embeddings", "positions are rotary"),
    same("--no-position-embedding", "there is no table of positions"),
    same("--swiglu", "every feed-forward layer is SwiGLU"),
    same("--disable-bias-linear", "no linear layer has a bias, but for --add-qkv-bias"),
    same_if("--group-query-attention", "attention is grouped as --num-query-groups says", _groups),
    same("--use-mcore-models", "models are megatron-core's"),
    same(
        "--apply-layernorm-1p",
        "norm weights have no weight decay here, so to centre them on 0 changes nothing but how they are stored",
    ),
    same("--no-persist-layer-norm", "norms are RMSNorm, which has no persistent kernel"),
    same_for("--softmax-type", "vanilla", "attention is softmax attention", "attention is plain softmax attention"),
    same_for(
        "--rope-type",
        "rope",
        "positions are rotary",
        "here YaRN is --yarn-rotary-scaling-factor",
    ),
    Entry(
        "--use-rope-scaling",
        "means",
        "Llama 3's frequency scaling: --rope-scaling-factor, 8.0 where it is not given",
        "nothing",
        _rope_scaling,
    ),
    refused("--fp16", "there is no fp16 with loss scaling here: --bf16, or fp32 without either"),
    refused("--use-legacy-models", "models are megatron-core's; the legacy ones are not here"),
    refused("--squared-relu", f"the activation is SwiGLU: {_FAMILY}"),
    refused("--quick-geglu", f"the activation is SwiGLU: {_FAMILY}"),
    refused("--openai-gelu", f"the activation is SwiGLU: {_FAMILY}"),
    refused("--onnx-safe", "there is no ONNX export here", takes="one"),
    refused("--activation-func-clamp-value", "the activation is plain SwiGLU, not clamped", takes="one"),
    refused("--glu-linear-offset", "the activation is plain SwiGLU, without an offset", takes="one"),
    refused("--apply-residual-connection-post-layernorm", f"the residual goes around the norm: {_FAMILY}"),
    refused("--rotary-interleaved", "rotary halves are not interleaved here, as in Llama"),
    refused("--mrope-section", "positions are those of text here", takes="many"),
    refused("--relative-attention-num-buckets", f"positions are rotary: {_FAMILY}", takes="one"),
    refused("--relative-attention-max-distance", f"positions are rotary: {_FAMILY}", takes="one"),
    refused("--qk-l2-norm", "queries and keys have an RMSNorm here (--qk-layernorm), no L2 norm"),
    refused("--window-size", "attention is over the whole sequence here", takes="one"),
    refused("--window-attn-skip-freq", "attention is over the whole sequence here", takes="one"),
    refused("--multi-latent-attention", _NO_MLA),
    *(
        refused(flag, _NO_MLA, takes="one")
        for flag in words("""
            --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --rotary-scaling-factor
            --mscale --mscale-all-dim
            """)
    ),
    refused("--cache-mla-latents", _NO_MLA),
    refused("--mtp-num-layers", _NO_MTP, takes="one"),
    refused("--mtp-loss-scaling-factor", _NO_MTP, takes="one"),
    *(
        refused(flag, _NO_LAYERS, takes="one")
        for flag in words("""
            --heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json --hybrid-attention-ratio
            --hybrid-mlp-ratio --hybrid-override-pattern --mamba-state-dim --mamba-head-dim --mamba-num-groups
            --mamba-num-heads
            """)
    ),
    refused("--is-hybrid-model", _NO_LAYERS),
    refused("--disable-mamba-mem-eff-path", _NO_LAYERS),
    refused("--spec", "the layers are chosen by --transformer-impl", takes="many"),
    refused("--encoder-num-layers", "there is no encoder; the layers are --num-layers", takes="one"),
    refused("--decoder-num-layers", "the layers are --num-layers", takes="one"),
    refused("--init-method-xavier-uniform", "weights are drawn from a normal distribution (--init-method-std)"),
    refused("--embedding-init-method-std", "embeddings are drawn as all weights (--init-method-std)", takes="one"),
    refused("--data-parallel-random-init", "every copy of the model starts from the same weights (--seed)"),
    refused("--bert-no-binary-head", _FAMILY),
)

EXPERTS: tuple[Entry, ...] = (
    same_for(
        "--moe-router-load-balancing-type",
        "aux_loss",
        "experts are balanced by an auxiliary loss",
        _ROUTER,
        takes="many",
    ),
    same_for("--moe-router-score-function", "softmax", "the router is a softmax", _ROUTER),
    same_for("--moe-layer-freq", "1", "every layer has experts", "every layer has experts here"),
    same_for("--moe-token-drop-policy", "probs", "no token is dropped", _NO_DROP),
    same("--moe-grouped-gemm", "experts run one after the other: the same numbers, slower", told=True),
    same("--moe-use-legacy-grouped-gemm", "experts run one after the other: the same numbers, slower", told=True),
    same("--moe-permute-fusion", "a kernel of its own for the same numbers; none is used"),
    same("--moe-router-fusion", "a kernel of its own for the same numbers; none is used"),
    same("--moe-shared-expert-overlap", "the shared expert runs before the others: the same numbers"),
    same("--moe-per-layer-logging", "the balancing loss is not logged by layer"),
    same("--moe-deepep-num-sms", "DeepEP is not used", takes="one"),
    same(
        "--overlap-moe-expert-parallel-comm",
        "messages of experts are not overlapped: the same numbers, slower",
        told=True,
    ),
    same("--delay-wgrad-compute", "weight gradients are computed at once: the same numbers"),
    refused("--moe-extended-tp", "say the size itself: --expert-tensor-parallel-size"),
    refused("--moe-enable-deepep", "tokens reach experts by --moe-token-dispatcher-type alltoall or allgather"),
    refused("--moe-router-dtype", "the router computes in the model's precision", takes="one"),
    refused("--moe-router-num-groups", _ROUTER, takes="one"),
    refused("--moe-router-group-topk", _ROUTER, takes="one"),
    refused("--moe-router-topk-scaling-factor", _ROUTER, takes="one"),
    refused("--moe-router-enable-expert-bias", _ROUTER),
    refused("--moe-router-bias-update-rate", _ROUTER, takes="one"),
    refused("--moe-router-force-load-balancing", "random routing is for benchmarks alone"),
    refused("--moe-router-padding-for-fp8", "experts' inputs are not padded; drop it"),
    refused(
        "--moe-z-loss-coeff",
        "the router has no z-loss here (--z-loss-coeff is of the vocabulary's logits)",
        takes="one",
    ),
    refused("--moe-input-jitter-eps", _ROUTER, takes="one"),
    refused("--moe-expert-capacity-factor", _NO_DROP, takes="one"),
    refused("--moe-pad-expert-input-to-capacity", _NO_DROP),
    refused("--moe-pad-experts-for-cuda-graph-inference", _NO_DROP),
    refused("--moe-apply-probs-on-input", "experts' outputs are weighted, not their inputs"),
    refused("--moe-layer-recompute", "activations are recomputed by --recompute-granularity"),
    refused("--moe-use-upcycling", "a dense checkpoint is not turned into experts here"),
    refused("--moe-upcycling-granularity", "a dense checkpoint is not turned into experts here", takes="one"),
)

PRECISION: tuple[Entry, ...] = (
    same("--attention-softmax-in-fp32", "the softmax of attention is in fp32"),
    same("--accumulate-allreduce-grads-in-fp32", "gradients are added up and reduced in fp32"),
    same("--grad-reduce-in-bf16", "gradients are reduced in fp32: more exact, twice the bytes", told=True),
    same(
        "--disable-bf16-reduced-precision-matmul",
        "torch's own default holds; set it in torch where it matters",
        told=True,
    ),
    same_for("--main-grads-dtype", "fp32", "gradients are fp32", "gradients are fp32 here"),
    same_for(
        "--main-params-dtype", "fp32", "the optimizer's parameters are fp32", "the optimizer's parameters are fp32"
    ),
    same_for("--exp-avg-dtype", "fp32", "the optimizer's moments are fp32", "the optimizer's moments are fp32 here"),
    same_for("--exp-avg-sq-dtype", "fp32", "the optimizer's moments are fp32", "the optimizer's moments are fp32 here"),
    same("--no-fp8-wgrad", "Transformer Engine's layers decide it by the recipe", told=True),
    same_for("--fp4-recipe", "nvfp4", "FP4 is scaled by blocks", "FP4 is scaled as NVFP4 says"),
    same_for(
        "--num-layers-at-start-in-bf16",
        "1",
        "--first-last-layers-bf16 keeps one layer at each end",
        "--first-last-layers-bf16 keeps one layer at each end",
    ),
    same_for(
        "--num-layers-at-end-in-bf16",
        "1",
        "--first-last-layers-bf16 keeps one layer at each end",
        "--first-last-layers-bf16 keeps one layer at each end",
    ),
    same("--te-rng-tracker", "dropout's generators are megatron-core's own"),
    same("--inference-rng-tracker", "dropout's generators are megatron-core's own"),
    refused("--use-precision-aware-optimizer", "the optimizer keeps fp32 parameters and moments"),
    refused("--fp32-residual-connection", "the residual stream has the model's precision"),
    refused("--apply-query-key-layer-scaling", "scores are not scaled by the layer's number; it is for fp16"),
    refused("--fp16-lm-cross-entropy", "the loss is computed in fp32"),
    *(
        refused(flag, "there is no loss scaling here: bf16 and fp32 need none", takes="one")
        for flag in words("""
            --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
            """)
    ),
    refused("--reuse-grad-buf-for-mxfp8-param-ag", "gradient buffers hold gradients alone"),
    refused("--fp4-param-gather", "parameters are not kept in FP4 here"),
    refused("--fp4-quantizer-factory", "FP4 is scaled as NVFP4 says; no code is loaded by name", takes="one"),
    refused("--fp8-quantizer-factory", "FP8 is scaled as --fp8-recipe says; no code is loaded by name", takes="one"),
    refused("--kitchen-config-file", "quantisation is by --fp8-format and --fp8-recipe", takes="one"),
    refused("--kitchen-recipe-number", "quantisation is by --fp8-format and --fp8-recipe", takes="one"),
)
