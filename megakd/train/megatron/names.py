"""Flags that Megatron-LM and this trainer have under one name, with one meaning."""

from __future__ import annotations

from megakd.train.megatron.verdicts import words

SHARED: tuple[str, ...] = tuple(
    f"--{name}"
    for name in words(
        """
    train-iters train-samples micro-batch-size global-batch-size rampup-batch-size seed exit-interval
    exit-duration-in-mins num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups kv-channels
    normalization norm-epsilon add-qkv-bias qk-layernorm rotary-base rotary-percent rope-scaling-factor
    rotary-seq-len-interpolation-factor no-rope-freq moe-router-pre-softmax
    untie-embeddings-and-output-weights init-method-std hidden-dropout attention-dropout make-vocab-size-divisible-by
    num-experts moe-router-topk moe-ffn-hidden-size moe-token-dispatcher-type moe-aux-loss-coeff
    moe-shared-expert-intermediate-size transformer-impl bf16 fp8-format fp8-recipe fp8-param-gather fp8-margin
    fp8-amax-history-len fp8-amax-compute-algo fp4-format first-last-layers-bf16 recompute-granularity
    recompute-method recompute-num-layers data-path valid-data-path split seq-length vocab-size tokenizer-type
    tokenizer-model eod-mask-loss lr min-lr decoupled-lr decoupled-min-lr lr-decay-style lr-warmup-iters
    lr-warmup-samples lr-warmup-fraction lr-warmup-init lr-decay-iters lr-decay-samples lr-wsd-decay-style
    lr-wsd-decay-iters lr-wsd-decay-samples weight-decay adam-beta1 adam-beta2 adam-eps clip-grad
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size sequence-parallel use-distributed-optimizer overlap-grad-reduce overlap-param-gather
    distributed-timeout-minutes save load save-interval async-save finetune exit-on-missing-checkpoint eval-interval
    eval-iters skip-train log-interval tensorboard-dir wandb-project wandb-exp-name wandb-save-dir
    """
    )
)
