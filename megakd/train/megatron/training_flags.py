"""Megatron-LM's flags of the training: steps, learning rate, data, checkpoints, the record."""

from __future__ import annotations

import json
from pathlib import Path

from megakd.config.command_line import Line
from megakd.model.checkpoint.record import latest_iteration
from megakd.train.megatron.verdicts import (
    Entry,
    Reading,
    becomes,
    flags_of,
    means,
    refused,
    same,
    same_for,
    same_if,
    words,
)

_ADAM = "the optimizer is Adam with decoupled weight decay"
_MUON = "the optimizer is Adam with decoupled weight decay; there is no Muon"
_MOCK = "there is no made-up data: make a dataset with 'megakd preprocess' and give --data-path PREFIX"
_BPE = "give the tokenizer as one file: --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
_TIKTOKEN = f"there is no tiktoken tokenizer here; {_BPE}"
_WHOLE = "whole checkpoints are saved, so that every one of them can be continued"
_SCHEDULE = "the schedule is what the flags say, also where a run continues; give the flags it was started with"


def _weights_alone(words: tuple[str, ...], line: Line) -> str:
    if not line.has("--load") and line.files.get("checkpoint.load") is None:
        save = (line.of("--save") or (line.files.get("checkpoint.save"),))[0]
        if save is None or latest_iteration(str(save)) is None:
            return ""  # nothing is loaded, so nothing of it is left out
        return (
            f"--save {save} holds a run, which goes on with all of its state: drop the flag, or start from its weights "
            f"(--load {save} --finetune, and another --save)"
        )
    return "weights without the optimizer's state are --finetune: new optimizer, step 0, first sample"


def _read_paths(words: tuple[str, ...], line: Line) -> Reading:
    try:
        return Reading(flags_of(["--data-path", *Path(words[0]).read_text(encoding="utf-8").split()]))
    except (OSError, UnicodeDecodeError) as error:
        return Reading(refused=f"{words[0]} cannot be read: {error}")


def _read_split_paths(words: tuple[str, ...], line: Line) -> Reading:
    try:
        parts = json.loads(Path(words[0]).read_text(encoding="utf-8"))
        paths = {part: [str(word) for word in parts.get(part) or []] for part in ("train", "valid")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return Reading(refused=f"{words[0]} is no JSON object of the lists train, valid and test: {error}")
    names = {"train": "--data-path", "valid": "--valid-data-path"}
    return Reading(flags_of([word for part, blend in paths.items() if blend for word in (names[part], *blend)]))


def _train_path(words: tuple[str, ...], line: Line) -> Reading:
    if line.has("--data-path") or line.has("--split"):
        return Reading(refused="--data-path and --split are for one dataset cut into parts; give one or the other")
    return Reading(flags_of(["--data-path", *words]))


STEPS: tuple[Entry, ...] = (
    same_for("--optimizer", "adam", _ADAM, _ADAM),
    same_for("--weight-decay-incr-style", "constant", "weight decay is constant", "weight decay is constant here"),
    refused("--start-weight-decay", "weight decay is constant: --weight-decay", takes="one"),
    refused("--end-weight-decay", "weight decay is constant: --weight-decay", takes="one"),
    refused("--sgd-momentum", _ADAM, takes="one"),
    refused("--muon-no-split-qkv", _MUON),
    refused("--muon-use-nesterov", _MUON),
    *(
        refused(flag, _MUON, takes="one")
        for flag in words("""
            --muon-momentum --muon-scale-mode --muon-fp32-matmul-prec --muon-num-ns-steps --muon-tp-mode
            --muon-extra-scale-factor
            """)
    ),
    same("--override-opt_param-scheduler", "the schedule is what the flags say"),
    same("--override-opt-param-scheduler", "the schedule is what the flags say"),
    refused("--use-checkpoint-opt_param-scheduler", _SCHEDULE),
    refused("--use-checkpoint-opt-param-scheduler", _SCHEDULE),
    same("--calculate-per-token-loss", "the loss is a mean over the tokens of the whole global batch"),
    same("--cross-entropy-loss-fusion", "logits are swept in chunks: see --loss-implementation"),
    same("--cross-entropy-fusion-impl", "logits are swept in chunks: see --loss-implementation", takes="one"),
    same("--exit-signal-handler", "SIGTERM and SIGINT end a run after its step, with a checkpoint"),
    same("--check-for-nan-in-loss-and-grad", "a step that is not finite is never applied"),
    same(
        "--no-check-for-nan-in-loss-and-grad", "the check stays: a step that is not finite is never applied", told=True
    ),
    same("--check-for-spiky-loss", "losses are not judged, but every one is in SAVE/metrics.jsonl"),
    same("--check-for-large-grads", "gradient norms are not judged, but every one is in SAVE/metrics.jsonl"),
    same_for(
        "--rerun-mode", "disabled", "nothing is run again", "results are not validated by running again: disabled"
    ),
    refused("--error-injection-rate", "no error is injected", takes="one"),
    refused("--error-injection-type", "no error is injected", takes="one"),
    refused("--iterations-to-skip", "no step is left out; a bad sample can be, by --selection", takes="many"),
    refused("--result-rejected-tracker-filename", "results are not validated by running again", takes="one"),
    refused(
        "--decrease-batch-size-if-needed", "the global batch is what --global-batch-size says, on any number of ranks"
    ),
    refused("--batch-size", "say --micro-batch-size (of a rank) and --global-batch-size (of a step)", takes="one"),
    refused("--warmup", "say --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction", takes="one"),
    refused("--train-sync-interval", "every step ends with a sum over all ranks", takes="one"),
    refused("--test-mode", "there are no tests inside a run"),
    refused("--full-validation", "an evaluation takes --eval-iters batches, at most one pass over the data"),
    refused("--multiple-validation-sets", "held-out data is one blend: --valid-data-path"),
)

DATA: tuple[Entry, ...] = (
    becomes("--train-data-path", "training data: --data-path with the same words", _train_path, takes="many"),
    same(
        "--test-data-path",
        "a run has held-out data alone (--valid-data-path); for a test set, afterwards: --skip-train --load SAVE",
        takes="many",
        told=True,
    ),
    becomes("--data-args-path", "a file with the words of --data-path", _read_paths),
    becomes(
        "--per-split-data-args-path",
        "a JSON file with the words of --data-path and --valid-data-path",
        _read_split_paths,
    ),
    refused("--mock-data", _MOCK),
    refused("--vocab-file", _BPE, takes="one"),
    refused("--merge-file", _BPE, takes="one"),
    refused("--vocab-extra-ids", "the vocabulary is the tokenizer's own", takes="one"),
    refused("--padded-vocab-size", "it follows from --vocab-size, --make-vocab-size-divisible-by and TP", takes="one"),
    refused("--tiktoken-pattern", _TIKTOKEN, takes="one"),
    refused("--tiktoken-num-special-tokens", _TIKTOKEN, takes="one"),
    refused("--tiktoken-special-tokens", _TIKTOKEN, takes="many"),
    refused("--tokenizer-metadata", "the dataset's manifest tells the tokenizer; drop it", takes="one"),
    refused("--trust-remote-code", "loading runs no code"),
    same("--legacy-tokenizer", "tokenizers are read from their files"),
    same("--no-use-tokenizer-model-from-checkpoint-args", "the dataset's manifest tells the tokenizer"),
    same("--data-cache-path", "there is nothing to cache: the order is computed, not stored", takes="one"),
    same("--no-mmap-bin-files", "datasets are mapped, whatever is given: the same samples", told=True),
    same("--no-create-attention-mask-in-dataloader", "attention is causal, without a mask in memory"),
    same("--num-workers", "samples are read by the rank itself", takes="one"),
    same("--num-dataset-builder-threads", "there is no index to build", takes="one"),
    same("--mid-level-dataset-surplus", "there is no index to build", takes="one"),
    same_for(
        "--dataloader-type",
        "single cyclic",
        "the order is a permutation of all samples, a new one each epoch",
        "the data is read from --data-path",
    ),
    same_for("--sample-rate", "1 1.0", "all samples are used", "all samples are used; keep some by --selection"),
    refused("--object-storage-cache-path", "datasets are files; copy them from object storage first", takes="one"),
    refused("--reset-position-ids", "attention goes over ends of documents; --packing document keeps them apart"),
    refused("--reset-attention-mask", "attention goes over ends of documents; --packing document keeps them apart"),
    refused("--allow-ambiguous-pad-tokens", "no padding id is looked for: what is padding follows from the lengths"),
    refused("--encoder-seq-length", "the length of a sample is --seq-length", takes="one"),
    refused("--decoder-seq-length", "the length of a sample is --seq-length", takes="one"),
    refused(
        "--yaml-cfg", "a configuration file is --config FILE, with the keys that --print-config shows", takes="one"
    ),
    same("--disable-msc", "there is no storage client"),
)

CHECKPOINTS: tuple[Entry, ...] = (
    same_for("--ckpt-format", "torch_dist", "checkpoints are torch_dist", "checkpoints are torch_dist here"),
    same_for("--dist-ckpt-format", "torch_dist", "checkpoints are torch_dist", "checkpoints are torch_dist here"),
    same("--use-dist-ckpt", "checkpoints are distributed ones"),
    same("--auto-detect-ckpt-format", "checkpoints are torch_dist"),
    same("--ckpt-fully-parallel-save", "every rank writes its part"),
    same("--no-ckpt-fully-parallel-save", "every rank writes its part, whatever is given"),
    same("--ckpt-fully-parallel-load", "every rank reads its part"),
    same("--ckpt-assume-constant-structure", "a checkpoint's structure is made anew each time"),
    same("--use-persistent-ckpt-worker", "--async-save writes in the background without it"),
    same("--dist-ckpt-optim-fully-reshardable", "the optimizer's state can be read in any layout"),
    same("--distrib-optim-fully-reshardable-mem-efficient", "the optimizer's state can be read in any layout"),
    same_for(
        "--dist-ckpt-strictness",
        "raise_all raise_unexpected log_all assume_ok_unexpected",
        "a weight that is missing is refused",
        "a weight that is missing is refused, whatever is given",
    ),
    same_if("--no-load-optim", "accepted if nothing is loaded; with --load it is --finetune", _weights_alone),
    same_if("--no-load-rng", "accepted if nothing is loaded; with --load it is --finetune", _weights_alone),
    same("--no-save-optim", _WHOLE, told=True),
    same("--no-save-rng", _WHOLE, told=True),
    same("--no-initialization", "weights are drawn, and then read where there is a checkpoint"),
    same("--use-cpu-initialization", "weights follow from the seed alone, in any layout and on any device"),
    same("--lazy-mpu-init", "groups are made at the start", takes="one"),
    means("--persistent-save-interval", "every checkpoint is persistent", "--save-interval {}", takes="one"),
    means("--pretrained-checkpoint", "a new run from trained weights", "--load {} --finetune", takes="one"),
    refused("--use-checkpoint-args", "give the model's shape by flags (a teacher's is read from its checkpoint)"),
    refused("--use-mp-args-from-checkpoint-args", "the layout may differ from the checkpoint's: give it by flags"),
    refused(
        "--load-main-params-from-ckpt", "a run that continues takes the optimizer's own parameters; else --finetune"
    ),
    refused("--no-strict-fsdp-dtensor-load", "checkpoints are torch_dist"),
    refused("--non-persistent-save-interval", "every checkpoint stays: --save-interval", takes="one"),
    *(
        refused(flag, "every checkpoint stays, in --save", takes="one")
        for flag in words("""
            --non-persistent-ckpt-type --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir
            --non-persistent-local-ckpt-algo --save-retain-interval
            """)
    ),
    refused("--ckpt-convert-format", "checkpoints are torch_dist; they are not converted here", takes="one"),
    refused("--ckpt-convert-save", "checkpoints are torch_dist; they are not converted here", takes="one"),
    refused("--ckpt-convert-update-legacy-dist-opt-format", "checkpoints are torch_dist"),
    refused("--dist-ckpt-save-pre-mcore-014", "checkpoints have the format of the megatron-core that is installed"),
    refused("--replication", "checkpoints are in --save alone"),
    refused("--replication-jump", "checkpoints are in --save alone", takes="one"),
    refused("--replication-factor", "checkpoints are in --save alone", takes="one"),
    refused("--export-kd-teacher-load", "the teacher is --teacher-load DIR", takes="one"),
    refused("--export-kd-cfg", "distillation is set by --kd-* flags: see --help", takes="one"),
    refused("--export-kd-finalize", "distillation is set by --kd-* flags: see --help"),
    refused("--export-quant-cfg", "there is no quantisation after training here", takes="one"),
)

RECORD: tuple[Entry, ...] = (
    same("--log-throughput", "every console line has the throughput"),
    same("--log-progress", "SAVE/metrics.jsonl has every step, with tokens"),
    same("--log-timers-to-tensorboard", "TensorBoard has the time of a step"),
    same("--log-validation-ppl-to-tensorboard", "TensorBoard has the validation loss, whose exponential it is"),
    same("--log-memory-to-tensorboard", "memory is not logged"),
    same("--log-world-size-to-tensorboard", "the first console line has the world size"),
    same("--no-log-loss-scale-to-tensorboard", "there is no loss scale"),
    same("--log-params-norm", "norms of parameters are not logged", told=True),
    same("--log-num-zeros-in-grad", "zeros are not counted", told=True),
    same("--log-energy", "energy is not logged"),
    same("--log-straggler", "the slowest rank is not looked for"),
    same("--disable-straggler-on-startup", "the slowest rank is not looked for"),
    same("--straggler-ctrlr-port", "the slowest rank is not looked for", takes="one"),
    same("--straggler-minmax-count", "the slowest rank is not looked for", takes="one"),
    same("--timing-log-level", "the time of a whole step is logged", takes="one"),
    same("--timing-log-option", "the time of a whole step is logged", takes="one"),
    same("--no-barrier-with-level-1-timing", "the time of a whole step is logged"),
    same("--tensorboard-log-interval", "TensorBoard has the steps of the console lines: --log-interval", takes="one"),
    same("--tensorboard-queue-size", "the queue has TensorBoard's own size", takes="one"),
    same("--logging-level", "there are no levels of messages", takes="one"),
    same("--profile", "nothing is profiled; run the command under nsys or another profiler", told=True),
    same("--use-pytorch-profiler", "nothing is profiled", told=True),
    same("--profile-step-start", "nothing is profiled", takes="one"),
    same("--profile-step-end", "nothing is profiled", takes="one"),
    same("--profile-ranks", "nothing is profiled", takes="many"),
    same("--record-memory-history", "nothing is profiled", told=True),
    same("--memory-snapshot-path", "nothing is profiled", takes="one"),
    same("--no-one-logger", "there is no such logger"),
    same("--one-logger-async", "there is no such logger"),
    same("--one-logger-project", "there is no such logger", takes="one"),
    same("--one-logger-run-name", "there is no such logger", takes="one"),
    same("--app-tag-run-name", "there is no such logger", takes="one"),
    same("--app-tag-run-version", "there is no such logger", takes="one"),
    same("--config-logger-dir", "the resolved configuration is in SAVE/config.yaml", takes="one"),
)
