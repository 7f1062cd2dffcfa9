"""Megatron-LM's flags of the layout over machines and kernels, and of its other programs."""

from __future__ import annotations

from megakd.config.command_line import Line
from megakd.model.config import preset_layers
from megakd.train.megatron.verdicts import Entry, Reading, becomes, flags_of, means, refused, same, same_for, words

_FSDP = "data parallelism is megatron's own, with --use-distributed-optimizer or without"
_EVEN = "layers are split evenly over pipeline stages"
_KERNELS = "kernels are megatron-core's and Transformer Engine's own choice: the same numbers up to rounding"
_OFFLOAD = "parameters, gradients and the optimizer's state stay on the device"
_GRAPHS = "CUDA graphs are not captured here"
_RESTART = "a run that is ended continues by the same command"


def _stages(words: tuple[str, ...], line: Line) -> Reading:
    layers = line.number("--num-layers", "student.num_layers")
    if layers is None:
        preset = (line.of("--preset") or (str(line.files.get("student.preset") or ""),))[0]
        layers = preset_layers(preset)
    stages = line.number("--pipeline-model-parallel-size", "parallel.pipeline_model_parallel_size") or 1
    size = int(words[0]) if words[0].isascii() and words[0].isdigit() else 0
    if layers is None or size < 1 or layers % (stages * size):
        return Reading(
            refused=f"{words[0]} layers a chunk: expected a divisor of the layers of a stage "
            f"(--num-layers {layers} / --pipeline-model-parallel-size {stages})"
        )
    return _chunks((str(layers // stages // size),), line)


def _chunks(words: tuple[str, ...], line: Line) -> Reading:
    return Reading([] if words == ("1",) else flags_of(["--virtual-pipeline-model-parallel-size", *words]))


LAYOUT: tuple[Entry, ...] = (
    same_for(
        "--distributed-backend",
        "nccl gloo",
        "it follows from the device: NCCL on CUDA, gloo on a CPU",
        "it follows from the device: NCCL on CUDA, gloo on a CPU",
    ),
    same("--local-rank", "torchrun sets LOCAL_RANK", takes="one"),
    becomes(
        "--num-layers-per-virtual-pipeline-stage", "--virtual-pipeline-model-parallel-size layers / PP / N", _stages
    ),
    becomes(
        "--num-virtual-stages-per-pipeline-rank",
        "--virtual-pipeline-model-parallel-size N; nothing where N is 1",
        _chunks,
    ),
    means("--no-overlap-p2p-communication", "pipeline messages one by one", "--overlap-p2p-comm false"),
    means("--recompute-activations", "attention is recomputed", "--recompute-granularity selective"),
    same_for(
        "--recompute-modules",
        "core_attn",
        "selective recomputing is of attention",
        "selective recomputing is of attention alone",
        takes="many",
    ),
    same_for(
        "--num-distributed-optimizer-instances", "1", "there is one", "state is split over all data-parallel ranks"
    ),
    same_for(
        "--cp-comm-type",
        "p2p",
        "keys and values go around the ring",
        "keys and values go around the ring (p2p)",
        takes="many",
    ),
    same_for("--data-parallel-sharding-strategy", "no_shard", _FSDP, _FSDP),
    same_for(
        "--pipeline-model-parallel-comm-backend", "nccl", "messages go by NCCL on CUDA", "messages go by NCCL on CUDA"
    ),
    same("--ddp-bucket-size", "megatron-core's default: the same numbers", takes="one"),
    same("--ddp-num-buckets", "megatron-core's default: the same numbers", takes="one"),
    same("--ddp-pad-buckets-for-high-nccl-busbw", "megatron-core's default: the same numbers"),
    same("--ddp-average-in-collective", "gradients are summed, and divided by the number of tokens"),
    same("--ddp-reduce-scatter-with-fp32-accumulation", "gradients are reduced in fp32"),
    same("--no-align-grad-reduce", "megatron-core's default: the same numbers"),
    same("--no-align-param-gather", "megatron-core's default: the same numbers"),
    same("--no-gradient-reduce-div-fusion", "gradients are summed, and divided by the number of tokens"),
    same("--no-scatter-gather-tensors-in-pipeline", "messages are megatron-core's own"),
    same("--overlap-p2p-communication-warmup-flush", "the schedule is megatron-core's own: the same numbers"),
    same(
        "--microbatch-group-size-per-virtual-pipeline-stage",
        "the schedule is megatron-core's own: the same numbers",
        takes="one",
    ),
    same("--defer-embedding-wgrad-compute", "the head's weight gradient is made with the loss"),
    same("--wgrad-deferral-limit", "the head's weight gradient is made with the loss", takes="one"),
    same(
        "--overlap-param-gather-with-optimizer-step",
        "parameters are gathered as --overlap-param-gather says: the same numbers",
    ),
    same("--disable-gloo-process-groups", "no group of gloo is made beside NCCL's"),
    same("--high-priority-stream-groups", "streams have the default priority: the same numbers", takes="many"),
    same("--use-nccl-ub", "NCCL's buffers are its own: the same numbers"),
    same("--disable-symmetric-registration", "NCCL's buffers are its own"),
    same("--use-sharp", "set NCCL_COLLNET_ENABLE in the environment: the same numbers"),
    same("--sharp-enabled-group", "set NCCL_COLLNET_ENABLE in the environment", takes="one"),
    same("--nccl-communicator-config-path", "set NCCL's variables in the environment: the same numbers", takes="one"),
    same(
        "--distributed-timeout-seconds-after-init",
        "the timeout is --distributed-timeout-minutes throughout",
        takes="one",
        told=True,
    ),
    same("--use-tp-pp-dp-mapping", "ranks count tensor, context, data, pipeline; their order changes no number"),
    refused("--use-ring-exchange-p2p", "messages are sent by torch.distributed"),
    refused("--hierarchical-context-parallel-sizes", "keys and values go around one ring (p2p)", takes="many"),
    refused("--distribute-saved-activations", "saved activations stay on their rank; --sequence-parallel splits them"),
    refused("--model-parallel-size", "say --tensor-model-parallel-size", takes="one"),
    refused("--decoder-first-pipeline-num-layers", _EVEN, takes="one"),
    refused("--decoder-last-pipeline-num-layers", _EVEN, takes="one"),
    refused("--pipeline-model-parallel-layout", _EVEN, takes="one"),
    refused("--account-for-embedding-in-pipeline-split", _EVEN),
    refused("--account-for-loss-in-pipeline-split", _EVEN),
    refused("--checkpoint-activations", "say --recompute-granularity"),
    *(
        refused(flag, _FSDP)
        for flag in words("""
            --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward --use-megatron-fsdp --use-custom-fsdp
            --init-model-with-meta-device --fsdp-double-buffer --keep-fp8-transpose-cache
            --enable-full-sharding-in-hsdp
            """)
    ),
    refused("--suggested-communication-unit-size", _FSDP, takes="one"),
)

KERNELS: tuple[Entry, ...] = (
    same_for(
        "--attention-backend",
        "auto flash fused unfused local",
        _KERNELS,
        "one of auto, flash, fused, unfused, local",
    ),
    same("--use-flash-attn", _KERNELS),
    *(
        same(flag, _KERNELS)
        for flag in words("""
            --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
            --no-rope-fusion --no-gradient-accumulation-fusion --no-async-tensor-model-parallel-allreduce
            --use-te-activation-func --use-fused-weighted-squared-relu --no-clone-scatter-output-in-embedding
            --tp-comm-overlap --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad
            --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-split-ag
            --disable-tp-comm-split-rs --enable-experimental
            """)
    ),
    same("--tp-comm-overlap-cfg", _KERNELS, takes="one"),
    same("--tp-comm-bootstrap-backend", _KERNELS, takes="one"),
    same("--manual-gc", "Python collects garbage by its own rules: the same numbers"),
    same("--manual-gc-interval", "Python collects garbage by its own rules", takes="one"),
    same("--no-manual-gc-eval", "Python collects garbage by its own rules"),
    same("--empty-unused-memory-level", "torch keeps its memory: the same numbers", takes="one"),
    refused(
        "--deterministic-mode",
        "set it in the environment: NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 NCCL_ALGO=Ring "
        "(on a CPU a run repeats to the bit as it is)",
    ),
    refused("--check-weight-hash-across-dp-replicas-interval", "copies are not compared", takes="one"),
    refused("--cpu-offloading-num-layers", _OFFLOAD, takes="one"),
    refused("--optimizer-cpu-offload", _OFFLOAD),
    refused("--optimizer-offload-fraction", _OFFLOAD, takes="one"),
    refused("--use-torch-optimizer-for-cpu-offload", _OFFLOAD),
    refused("--overlap-cpu-optimizer-d2h-h2d", _OFFLOAD),
    refused("--no-pin-cpu-grads", _OFFLOAD),
    refused("--no-pin-cpu-params", _OFFLOAD),
    refused("--dump-param-to-param-group-map", _OFFLOAD, takes="one"),
    refused("--enable-cuda-graph", _GRAPHS),
    refused("--external-cuda-graph", _GRAPHS),
    same_for("--cuda-graph-impl", "none", _GRAPHS, _GRAPHS),
    refused("--cuda-graph-scope", _GRAPHS, takes="one"),
    refused("--cuda-graph-warmup-steps", _GRAPHS, takes="one"),
)

# Groups of Megatron's flags that belong to other models or programs than a decoder's pre-training.
ELSEWHERE: dict[str, str] = {
    "--retro-": "there is no retrieval here",
    "--ict-": "there is no retriever here",
    "--bert-": "there is no BERT here",
    "--biencoder-": "there is no retriever here",
    "--retriever-": "there is no retriever here",
    "--indexer-": "there is no retriever here",
    "--dino-": "there are no models of images here",
    "--vision-": "there are no models of images here",
    "--swin-": "there are no models of images here",
    "--img-": "there are no models of images here",
    "--inference-": "there is no server of models here; checkpoints are megatron-core's",
    "--grpo-": "there is no reinforcement learning here",
    "--rl-": "there is no reinforcement learning here",
    "--langrl-": "there is no reinforcement learning here",
    "--perform-rl-": "there is no reinforcement learning here",
    "--sft": "there is no fine-tuning on chats here; a trained model is the start of a run by --load DIR --finetune",
    "--inprocess-": _RESTART,
    "--adlr-": _RESTART,
    "--enable-ft-": _RESTART,
    "--calc-ft-": _RESTART,
    "--export-": "checkpoints are megatron-core's; they are exported by other programs",
}
