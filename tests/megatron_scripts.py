"""Flags of Megatron-LM's example scripts, without the launcher's; paths are words such as DATA, RUN and TOKENIZER."""

from __future__ import annotations

# examples/gpt3/train_gpt3_175b_distributed.sh
GPT3_175B = """
--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
--attention-backend auto --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375
--train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0
--fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path DATA --vocab-file VOCAB
--merge-file MERGES --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save RUN
--load RUN --eval-iters 10 --tensorboard-dir BOARD
"""

# examples/llama/train_llama3_8b_h100_fp8.sh, with data and a tokenizer
LLAMA3_8B = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
--hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
--untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1 --global-batch-size 128
--train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
--decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion
--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --fp8-format hybrid
--fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather --tensor-model-parallel-size 1
--context-parallel-size 1 --sequence-parallel --data-path DATA --tokenizer-type HuggingFaceTokenizer
--tokenizer-model TOKENIZER --data-cache-path CACHE --split '99,1,0' --no-create-attention-mask-in-dataloader
--no-mmap-bin-files --num-workers 1 --vocab-size 128256 --log-interval 1 --eval-iters 32 --eval-interval 100
--save-interval 1000 --log-throughput --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
--distributed-timeout-minutes 60 --save RUN --load RUN --tensorboard-dir BOARD
"""

# examples/mixtral/train_mixtral_8x7b_distributed.sh, with data where it has --mock-data
MIXTRAL = """
--use-mcore-models --disable-bias-linear --seq-length 256 --max-position-embeddings 2048 --num-layers 2
--hidden-size 256 --ffn-hidden-size 896 --num-attention-heads 2 --init-method-std 0.01 --attention-dropout 0.0
--hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2 --no-masked-softmax-fusion
--no-position-embedding --rotary-base 1000000 --num-experts 2 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall
--overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer --tokenizer-model TOKENIZER
--data-path DATA --split 99990,8,2 --micro-batch-size 1 --global-batch-size 4 --lr 1e-4 --train-iters 7
--min-lr 1.0e-5 --weight-decay 0.1 --clip-grad 1.0 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
--expert-model-parallel-size 2 --use-distributed-optimizer --sequence-parallel --eval-iters 10 --no-load-optim
--no-load-rng --wandb-project Mixtral --wandb-exp-name Mixtral_8x7B
"""


# Forms that users of Megatron-LM brought, between bars.
_FORMS = """
--num-layers 2 | --hidden-size 64 | --num-attention-heads 4 | --seq-length 2048 | --micro-batch-size 1 |
--global-batch-size 1536 | --train-iters 500 | --lr-warmup-iters 10 | --lr-decay-iters 430 | --weight-decay 0.1 |
--adam-beta1 0.9 | --adam-beta2 0.95 | --adam-eps 1e-8 | --init-method-std 0.006 | --clip-grad 1.0 | --bf16 | --lr
6.0e-5 | --lr 6e-5 | --min-lr 6.0e-6 | --lr-decay-style cosine | --lr-wsd-decay-style exponential |
--tensor-model-parallel-size 2 | --pipeline-model-parallel-size 2 | --context-parallel-size 2 |
--expert-model-parallel-size 2 | --expert-tensor-parallel-size 1 | --sequence-parallel | --use-distributed-optimizer |
--overlap-grad-reduce | --overlap-param-gather | --distributed-timeout-minutes 60 | --data-path x | --data-path 0.3 a
0.7 b | --valid-data-path a | --vocab-size 128256 | --tokenizer-type NullTokenizer | --tokenizer-type
HuggingFaceTokenizer | --tokenizer-type SentencePieceTokenizer | --tokenizer-model t | --eod-mask-loss |
--log-interval 100 | --save-interval 10000 | --eval-interval 1000 | --eval-iters 10 | --save s | --load s |
--tensorboard-dir t | --ffn-hidden-size 14336 | --num-query-groups 8 | --kv-channels 128 | --rotary-base 1000000 |
--rotary-percent 1.0 | --rope-scaling-factor 8.0 | --attention-dropout 0.0 | --hidden-dropout 0.0 | --normalization
RMSNorm | --norm-epsilon 1e-5 | --qk-layernorm | --transformer-impl transformer_engine | --transformer-impl local |
--exit-interval 10 | --fp8-format hybrid | --fp8-recipe delayed | --fp8-param-gather | --recompute-granularity full |
--recompute-method uniform | --recompute-num-layers 1 | --async-save | --finetune | --skip-train | --seed 42 |
--make-vocab-size-divisible-by 128 | --num-experts 8 | --moe-router-topk 2 | --moe-aux-loss-coeff 1e-2 |
--moe-token-dispatcher-type alltoall | --moe-ffn-hidden-size 64 | --moe-shared-expert-intermediate-size 64 |
--logits-save-dir t | --lr=1e-3 | --max-position-embeddings 2048 | --attention-backend auto | --rampup-batch-size 16
16 5859375 | --train-samples 1953125 | --lr-decay-samples 19492 | --lr-warmup-samples 3906 | --lr-warmup-fraction .001
| --lr-warmup-init 1e-7 | --weight-decay-incr-style constant | --start-weight-decay 0.1 | --fp16 | --decoupled-lr
5.0e-4 | --lr-decay-style inverse-square-root | --lr-wsd-decay-samples 100 | --optimizer adam |
--num-layers-per-virtual-pipeline-stage 1 | --num-virtual-stages-per-pipeline-rank 2 | --cp-comm-type p2p |
--tp-comm-overlap | --num-distributed-optimizer-instances 2 | --distributed-backend nccl | --ddp-bucket-size 40000000
| --ddp-average-in-collective | --use-torch-fsdp2 | --use-tp-pp-dp-mapping | --local-rank 0 | --train-data-path 0.3 a
0.7 b | --test-data-path a | --data-args-path x | --per-split-data-args-path x | --split 949,50,1 | --vocab-file v |
--merge-file m | --mock-data | --tokenizer-type GPT2BPETokenizer | --tokenizer-type Llama2Tokenizer | --tokenizer-type
Llama3Tokenizer | --tiktoken-pattern v2 | --data-cache-path c | --no-create-attention-mask-in-dataloader |
--no-mmap-bin-files | --num-workers 1 | --num-dataset-builder-threads 1 | --dataloader-type cyclic |
--reset-position-ids | --reset-attention-mask | --tensorboard-queue-size 1 | --wandb-project p | --wandb-exp-name e |
--log-throughput | --log-params-norm | --log-num-zeros-in-grad | --log-timers-to-tensorboard |
--log-validation-ppl-to-tensorboard | --log-memory-to-tensorboard | --timing-log-level 0 | --profile |
--profile-step-start 4 | --use-mcore-models | --group-query-attention | --position-embedding-type rope |
--no-position-embedding | --use-rotary-position-embeddings | --rotary-seq-len-interpolation-factor 1 |
--use-rope-scaling | --no-rope-fusion | --swiglu | --squared-relu | --normalization LayerNorm | --apply-layernorm-1p |
--untie-embeddings-and-output-weights | --disable-bias-linear | --add-qkv-bias | --multi-latent-attention |
--no-masked-softmax-fusion | --no-bias-swiglu-fusion | --no-bias-gelu-fusion | --no-bias-dropout-fusion |
--no-gradient-accumulation-fusion | --no-async-tensor-model-parallel-allreduce | --attention-softmax-in-fp32 |
--accumulate-allreduce-grads-in-fp32 | --use-flash-attn | --grad-reduce-in-bf16 | --cross-entropy-loss-fusion |
--cross-entropy-fusion-impl te | --calculate-per-token-loss | --manual-gc | --manual-gc-interval 5 |
--empty-unused-memory-level 1 | --exit-duration-in-mins 235 | --exit-signal-handler | --fp8-amax-history-len 1024 |
--fp8-amax-compute-algo max | --fp8-margin 0 | --recompute-activations | --distribute-saved-activations |
--ckpt-format torch_dist | --use-dist-ckpt | --dist-ckpt-format torch_dist | --ckpt-fully-parallel-load |
--ckpt-assume-constant-structure | --use-checkpoint-args | --use-checkpoint-opt_param-scheduler |
--override-opt_param-scheduler | --no-load-optim | --no-load-rng | --no-save-optim | --no-save-rng |
--no-initialization | --exit-on-missing-checkpoint | --auto-detect-ckpt-format | --non-persistent-save-interval 10 |
--pretrained-checkpoint p | --moe-router-load-balancing-type aux_loss | --moe-z-loss-coeff 1e-3 | --moe-grouped-gemm |
--moe-layer-freq [0]+[1]*3 | --moe-permute-fusion | --moe-router-dtype fp32 | --moe-router-enable-expert-bias |
--moe-router-score-function sigmoid | --moe-pad-expert-input-to-capacity | --moe-expert-capacity-factor 1.0 |
--moe-router-pre-softmax | --moe-per-layer-logging | --overlap-moe-expert-parallel-comm | --mtp-num-layers 1 |
--check-for-nan-in-loss-and-grad | --no-check-for-nan-in-loss-and-grad | --rerun-mode disabled | --enable-experimental
| --export-kd-teacher-load t | --export-kd-cfg c | --deterministic-mode | --train_iters 5 | --tp-size 2
"""
TRIED = [" ".join(form.split()) for form in _FORMS.split("|")]
