"""Options of a training run, and the refusal of values that cannot work. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megakd.config.tree import group, option
from megakd.data.batch_sizes import BatchSizes, Ramp
from megakd.data.samples.packing import Packing
from megakd.data.samples.split import Split
from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.model.checkpoint.record import latest_iteration
from megakd.model.config import ModelConfig
from megakd.train.given import check_given
from megakd.train.journal_config import LogitsSaveConfig
from megakd.train.lengths import Lengths, check_lengths, check_told_once, lr_lengths
from megakd.train.objective.config import ObjectiveConfig
from megakd.train.objective.schedule import DecayShape, KDSchedule, Phases
from megakd.train.teacher_config import TeacherConfig

_MOST_SAMPLES, _MOST_SAMPLES_A_STEP = 2**62, 2**24


@dataclass
class TrainingConfig:
    """Options of the run: its length, batches and seed."""

    train_iters: int = option(1000, "optimizer steps of the whole run", common=True)
    train_samples: int | None = option(
        None, "length of the whole run in samples, in place of train-iters; the learning rate then counts samples too"
    )
    micro_batch_size: int = option(1, "samples a rank passes through the model at once", common=True)
    global_batch_size: int = option(8, "samples of one optimizer step, over all ranks", common=True)
    rampup_batch_size: list[int] = option(
        [],
        "ramp of the global batch size, START INCREMENT SAMPLES: from START samples a step, INCREMENT more each time, "
        "over the first SAMPLES samples",
    )
    seed: int = option(1234, "seed of weights, data order and dropout", common=True)
    exit_interval: int | None = option(None, "number of steps of this process after which it saves and stops")
    exit_duration_in_mins: float | None = option(None, "minutes after which the run saves and stops, with status 75")

    def validate(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("train_samples", "exit_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if self.exit_duration_in_mins is not None and not 0 < self.exit_duration_in_mins < 1e7:
            raise UsageError(f"--exit-duration-in-mins is {self.exit_duration_in_mins}; expected minutes, more than 0")
        if self.global_batch_size > _MOST_SAMPLES_A_STEP:
            raise UsageError(
                f"--global-batch-size is {self.global_batch_size}; expected at most {_MOST_SAMPLES_A_STEP}: every rank "
                "holds the ids of a step's samples"
            )
        if self.train_iters * self.global_batch_size > _MOST_SAMPLES:
            raise UsageError(
                f"--train-iters {self.train_iters} x --global-batch-size {self.global_batch_size} is "
                f"{self.train_iters * self.global_batch_size} samples; expected at most 2^62, as far as samples can be "
                "counted"
            )
        if not 0 <= self.seed < 2**62:
            raise UsageError(f"--seed is {self.seed}; expected 0 to 2^62")
        if self.rampup_batch_size and len(self.rampup_batch_size) != 3:
            told = " ".join(map(str, self.rampup_batch_size))
            raise UsageError(f"--rampup-batch-size {told}: expected three numbers, START INCREMENT SAMPLES")
        sizes = self.batch_sizes  # refuses a ramp that does not end at the global batch
        if self.train_samples is not None and sizes.train_iters(self.train_samples) < 1:
            raise UsageError(f"--train-samples {self.train_samples} is less than one step of --global-batch-size")

    @property
    def rampup(self) -> Ramp | None:
        """Ramp of the global batch size; None without one."""
        return Ramp(*self.rampup_batch_size) if self.rampup_batch_size else None

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of each step."""
        return BatchSizes(self.global_batch_size, self.rampup)

    def check_batch(self, data_parallel_size: int) -> None:
        """Refuse a global batch that does not split over data-parallel ranks."""
        piece = self.micro_batch_size * data_parallel_size
        for size in self.batch_sizes.levels:
            if size % piece:
                flag = "--global-batch-size" if size == self.global_batch_size else "--rampup-batch-size comes to"
                raise UsageError(
                    f"{flag} {size} is not a multiple of --micro-batch-size x data-parallel size = "
                    f"{self.micro_batch_size} x {data_parallel_size} = {piece}"
                )


@dataclass
class DataConfig:
    """Options of the training and held-out data."""

    data_path: list[str | float] = option([], "training data: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...", common=True)
    valid_data_path: list[str | float] = option([], "held-out data, in the form of --data-path", common=True)
    split: str | None = option(
        None,
        "shares of training, held-out and test documents of --data-path, such as 969,30,1: each dataset is cut in "
        "that order (default: all of it for training)",
    )
    seq_length: int = option(1024, "tokens of one sample", common=True)
    packing: Packing = option(
        "concat",
        "form of a sample: a window (concat), a window cut back to a sentence end (sentence), or a document",
        common=True,
    )
    valid_packing: Packing | None = option(None, "packing of the held-out data (default: as --packing)")
    selection: list[str] = option(
        [],
        "samples to train on: a folder of 'megakd select' for each dataset, or 'all' for a dataset that is used whole",
        common=True,
    )
    vocab_size: int | None = option(
        None,
        "number of ids in the vocabulary (default: the tokenizer's, from the dataset's manifest or --tokenizer-model); "
        "further rows of a model's embedding are padding",
    )
    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"] | None
    ) = option(None, "type of the tokenizer that made the data (default: as its manifest records)")
    tokenizer_model: str | None = option(
        None, "file of that tokenizer, the same as of teacher and checkpoint (default: as the manifest records)"
    )
    eod_mask_loss: bool = option(
        False,
        "leave out of the loss, in training and evaluation, the first token of every document: by the "
        "end-of-document id before it, or by the dataset's index",
    )

    def validate(self) -> None:
        if not self.data_path:
            raise UsageError("missing --data-path: the prefix of a dataset made by 'megakd preprocess'")
        if not 1 <= self.seq_length <= 1 << 30:
            raise UsageError(f"--seq-length is {self.seq_length}; expected 1 to {1 << 30}")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= 1 << 30:
            raise UsageError(f"--vocab-size is {self.vocab_size}; expected 1 to {1 << 30}")
        if self.split is not None:
            shares = self.split_shares.shares  # refuses a text that is not a list of shares
            if self.valid_data_path and shares[1]:
                raise UsageError(
                    f"--split {self.split} and --valid-data-path both say what is held out: drop one, or give the "
                    "second part no share"
                )

    @property
    def split_shares(self) -> Split:
        """Shares of ``split``; without it, all documents are for training."""
        return Split(self.split or "1")

    @property
    def has_held_out(self) -> bool:
        """True if there is held-out data to evaluate on."""
        return bool(self.valid_data_path) or self.split_shares.shares[1] > 0


@dataclass
class OptimConfig:
    """Options of the optimizer and of the learning rate."""

    lr: float = option(3e-4, "peak learning rate", common=True)
    min_lr: float = option(0.0, "learning rate at the end of the decay", common=True)
    decoupled_lr: float | None = option(None, "peak learning rate of embeddings and output weight (default: as --lr)")
    decoupled_min_lr: float | None = option(
        None, "learning rate of embeddings and output weight at the end of the decay (default: as --min-lr)"
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = option(
        "cosine", "decay after warm-up", common=True
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up", common=True)
    lr_warmup_samples: int = option(0, "samples of linear warm-up, in a run of --train-samples")
    lr_warmup_fraction: float | None = option(None, "share of the decay's steps or samples that is warm-up")
    lr_warmup_init: float = option(0.0, "learning rate at which the warm-up starts")
    lr_decay_iters: int | None = option(None, "step at which the decay ends (default: train-iters)")
    lr_decay_samples: int | None = option(
        None, "sample at which the decay ends, in a run of --train-samples (default: train-samples)"
    )
    lr_wsd_decay_style: DecayShape = option("minus_sqrt", "shape of WSD's final decay (minus_sqrt: 1 - sqrt)")
    lr_wsd_decay_iters: int | None = option(None, "steps of WSD's final decay (default: a tenth of the run)")
    lr_wsd_decay_samples: int | None = option(None, "samples of WSD's final decay, in a run of --train-samples")
    weight_decay: float = option(0.1, "decoupled weight decay; none on norms and biases", common=True)
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "epsilon, added to the root of the second moment")
    clip_grad: float = option(1.0, "largest gradient norm; 0 for none", common=True)

    def validate(self) -> None:
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"--lr {self.lr} and --min-lr {self.min_lr}; expected 0 <= min-lr <= lr and lr > 0")
        for name in ("clip_grad", "weight_decay", "lr_warmup_iters", "lr_warmup_samples"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 <= beta < 1")
        if not self.adam_eps > 0:
            raise UsageError(f"--adam-eps is {self.adam_eps}; expected a positive number")
        for name in ("lr_decay_iters", "lr_wsd_decay_iters", "lr_decay_samples", "lr_wsd_decay_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            raise UsageError(f"--lr-warmup-fraction is {self.lr_warmup_fraction}; expected 0 <= share < 1")
        if not 0 <= self.lr_warmup_init <= self.lr:
            raise UsageError(f"--lr-warmup-init is {self.lr_warmup_init}; expected 0 to --lr {self.lr}")
        low = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        if self.decoupled_lr is None and self.decoupled_min_lr is not None:
            raise UsageError(f"--decoupled-min-lr {self.decoupled_min_lr} without --decoupled-lr")
        if self.decoupled_lr is not None and not max(low, self.lr_warmup_init) <= self.decoupled_lr > 0 <= low:
            raise UsageError(
                f"--decoupled-lr {self.decoupled_lr} with a least rate of {low}; expected 0 <= least <= peak, peak > 0"
            )

    def phases(self, train_iters: int) -> Phases:
        """Return the phases that the WSD style would have, in steps, for a run whose length is given in steps."""
        return lr_lengths(self, train_iters).phases(int, self.lr_wsd_decay_style)


@dataclass
class CheckpointConfig:
    """Options for saving and loading checkpoints."""

    save: str | None = option(None, "folder for checkpoints, records and the resolved configuration", common=True)
    load: str | None = option(
        None,
        "folder of the checkpoint to start from, or with --finetune a Hugging Face folder (default: continue in --save "
        "if it holds a checkpoint); if it is the folder of --save and holds no checkpoint yet, the run starts from the "
        "seed",
        common=True,
    )
    ckpt_step: int | None = option(
        None, "step whose checkpoint to start from, in --load, or in --save without it (default: the latest)"
    )
    save_interval: int = option(1000, "steps between checkpoints; the last step has one too", common=True)
    async_save: bool = option(False, "write checkpoints in the background")
    finetune: bool = option(
        False,
        "take only the weights of --load, and its model if no flag describes one: new optimizer, step 0, first sample",
    )
    hf_export_interval: int | None = option(
        None,
        "steps between exports as Hugging Face folders, made of the checkpoints of these steps and of the last one by "
        "a process beside the run (default: none)",
    )
    hf_export_dir: str | None = option(None, "folder for these exports (default: SAVE/hf)")
    exit_on_missing_checkpoint: bool = option(
        False, "refuse a --load without a checkpoint even if it is the folder of --save, instead of starting anew"
    )

    @property
    def starts_afresh(self) -> bool:
        """True if the run loads from the folder it saves to, as Megatron's scripts do, and no checkpoint is there yet.

        With ``finetune``, and for any other folder, the checkpoint must exist: otherwise a mistyped name would train a
        model from the seed.
        """
        if not (self.load and self.save) or self.finetune or self.exit_on_missing_checkpoint:
            return False
        return Path(self.load).resolve() == Path(self.save).resolve() and latest_iteration(self.save) is None

    @property
    def hf_exports(self) -> str | None:
        """Folder of the exports; None without any."""
        if self.hf_export_interval is None or self.save is None:
            return None
        return self.hf_export_dir or str(Path(self.save) / "hf")

    def validate(self) -> None:
        self._check_exports()
        if self.save_interval < 0:
            raise UsageError(f"--save-interval is {self.save_interval}; expected 0 (at the end alone) or more")
        if self.ckpt_step is not None and not (self.load or self.save):
            raise UsageError(
                f"--ckpt-step {self.ckpt_step} chooses a checkpoint: of which folder? Add --load or --save"
            )

    def _check_exports(self) -> None:
        interval = self.hf_export_interval
        if interval is None:
            if self.hf_export_dir is not None:
                raise UsageError(f"--hf-export-dir {self.hf_export_dir} without --hf-export-interval")
            return
        if interval < 1:
            raise UsageError(f"--hf-export-interval is {interval}; expected at least 1")
        if self.save is None:
            raise UsageError(f"--hf-export-interval {interval}: exports are made of checkpoints: add --save")
        if self.save_interval and interval % self.save_interval:
            raise UsageError(
                f"--hf-export-interval {interval} is not a multiple of --save-interval {self.save_interval}: exports "
                "are made of the checkpoints of their steps"
            )


@dataclass
class EvaluateConfig:
    """Options of the evaluation on held-out data."""

    eval_interval: int = option(100, "steps between evaluations; the last step has one too", common=True)
    eval_iters: int = option(10, "global batches of one evaluation, at most one pass over the data", common=True)
    skip_train: bool = option(False, "evaluate the checkpoint once: trains nothing, saves no checkpoint")

    def validate(self) -> None:
        if self.eval_iters < 1:
            raise UsageError(f"--eval-iters is {self.eval_iters}; expected at least 1")
        if self.eval_interval < 0:
            raise UsageError(f"--eval-interval is {self.eval_interval}; expected 0 (at the end alone) or more")


@dataclass
class LoggingConfig:
    """Options of the console lines and of the trackers."""

    log_interval: int = option(10, "steps between two lines on the console", common=True)
    tensorboard_dir: str | None = option(None, "folder for TensorBoard (default: SAVE/tensorboard)")
    wandb_project: str | None = option(None, "project of Weights & Biases that the run is recorded in too")
    wandb_exp_name: str | None = option(
        None, "name of the run in Weights & Biases (default: the name of the --save folder)"
    )
    wandb_save_dir: str | None = option(None, "folder for local files of Weights & Biases (default: SAVE)")
    wandb_entity: str | None = option(None, "user or team that the W&B project belongs to (default: yours)")
    mlflow_tracking_uri: str | None = option(None, "MLflow server or database that the run is recorded in too")
    mlflow_experiment: str | None = option(None, "experiment of the run in MLflow (default: Default)")
    mlflow_run_name: str | None = option(None, "name of the run in MLflow (default: the name of the --save folder)")

    def validate(self) -> None:
        if self.log_interval < 1:
            raise UsageError(f"--log-interval is {self.log_interval}; expected at least 1")
        for name in ("wandb_exp_name", "wandb_save_dir", "wandb_entity"):
            if getattr(self, name) is not None and self.wandb_project is None:
                raise UsageError(f"--{name.replace('_', '-')} without --wandb-project: nothing would go to W&B")
        if self.mlflow_run_name is not None and self.mlflow_tracking_uri is None and self.mlflow_experiment is None:
            raise UsageError(
                "--mlflow-run-name without --mlflow-tracking-uri or --mlflow-experiment: nothing would go to MLflow"
            )


@dataclass
class TrainConfig:
    """Root of the tree: groups in YAML, and one flat flag for each option."""

    training: TrainingConfig = group(TrainingConfig, "training")
    student: ModelConfig = group(ModelConfig, "model (the student)")
    teacher: TeacherConfig = group(TeacherConfig, "teacher", flag_prefix="teacher-")
    objective: ObjectiveConfig = group(ObjectiveConfig, "objective")
    data: DataConfig = group(DataConfig, "data")
    optim: OptimConfig = group(OptimConfig, "optimizer and learning rate")
    parallel: ParallelConfig = group(ParallelConfig, "distributed")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "checkpoints")
    evaluate: EvaluateConfig = group(EvaluateConfig, "evaluation")
    logging: LoggingConfig = group(LoggingConfig, "logging")
    logits_save: LogitsSaveConfig = group(
        LogitsSaveConfig, "logits of the model in training", flag_prefix="logits-save-"
    )

    def validate(self) -> None:
        if self.evaluate.skip_train and not self.data.has_held_out:
            raise UsageError("--skip-train only evaluates: it needs --valid-data-path or --split")
        if self.teacher.valid_logits_load_dir and not self.data.has_held_out:
            raise UsageError("--valid-logits-load-dir is for held-out data: add --valid-data-path or --split")
        self._check_objective()
        with_phases = self.teacher.is_there and self.objective.has_phases
        check_lengths(self.optim, self.lr_lengths, with_phases=with_phases)
        check_told_once(self.training)
        if self.parallel.context_parallel_size > 1 and self.data.seq_length % (2 * self.parallel.context_parallel_size):
            raise UsageError(
                f"--seq-length {self.data.seq_length} is not a multiple of 2 x --context-parallel-size "
                f"{self.parallel.context_parallel_size}: each rank takes two chunks of the sequence"
            )
        split = self.parallel.tensor_model_parallel_size * self.parallel.context_parallel_size
        if self.parallel.sequence_parallel and self.data.seq_length % split:
            raise UsageError(f"--seq-length {self.data.seq_length} is not a multiple of TP x CP = {split}")

    def _check_objective(self) -> None:
        objective, teacher = self.objective, self.teacher
        if teacher.load is None and objective.rho_keep != 1:
            with_stores = "; logits stores do not tell its loss on every label" if teacher.reads_stores else ""
            raise UsageError(
                f"--rho-keep {objective.rho_keep} asks a teacher which tokens to leave out: add --teacher-load DIR"
                + with_stores
            )
        if not teacher.is_there:
            if objective.kd_entropy_gate != 0:
                raise UsageError(
                    f"--kd-entropy-gate {objective.kd_entropy_gate} asks a teacher which tokens to leave out: add "
                    "--teacher-load DIR or --logits-load-dir DIR"
                )
            return
        if objective.kd_alpha == 0 and (objective.rho_keep == 1 or teacher.reads_stores):
            drop = "--logits-load-dir" if teacher.reads_stores else "--teacher-load"
            raise UsageError(f"--kd-alpha 0 with a teacher: it would run and change nothing; drop {drop}")
        if objective.kd_alpha == 0 and objective.kd_entropy_gate > 0:
            raise UsageError(f"--kd-entropy-gate {objective.kd_entropy_gate} with --kd-alpha 0: no token gets KD")
        sparse = teacher.reads_stores or bool(teacher.valid_logits_load_dir)
        if objective.kd_temperature_mode != "static" and sparse:
            raise UsageError(
                f"--kd-temperature-mode {objective.kd_temperature_mode} needs every logit of the teacher, and logits "
                "stores list some: use static"
            )
        if objective.kd_tail != "none" and not sparse:
            raise UsageError(
                f"--kd-tail {objective.kd_tail} is for sparse targets; a model as teacher (--teacher-load) tells its "
                "whole distribution: drop --kd-tail, or add --logits-load-dir"
            )

    def kd_schedule(self) -> KDSchedule | None:
        """Return alpha and the temperature as functions of the step; None if nothing is distilled."""
        if not self.teacher.is_there or self.objective.kd_alpha == 0:
            return None
        return self.objective.schedule(self.training.train_iters, self.phases())

    @property
    def lr_lengths(self) -> Lengths:
        """Phases of the learning rate, in steps or, with ``train_samples``, in samples."""
        return lr_lengths(self.optim, self.training.train_iters, self.training.train_samples)

    def phases(self) -> Phases:
        """Return the phases that the WSD style would have, in steps."""
        lengths, style = self.lr_lengths, self.optim.lr_wsd_decay_style
        return lengths.phases(self.training.batch_sizes.steps_of if lengths.unit == "samples" else int, style)

    def resolved(self) -> TrainConfig:
        """Return this configuration with ``train_iters`` set, even if the length is given in samples."""
        training = self.training
        if training.train_samples is None:
            return self
        train_iters = training.batch_sizes.train_iters(training.train_samples)
        return replace(self, training=replace(training, train_iters=train_iters))

    def check_given(self, given: frozenset[str]) -> None:
        """Refuse options that were given and would do nothing. given: their places in the tree."""
        check_given(self.training, self.teacher, self.objective, given)

    @property
    def trains_taid(self) -> bool:
        """True if the run trains with taid, whose progress its checkpoints keep."""
        objective = self.objective
        with_kd = self.teacher.is_there and objective.kd_alpha > 0
        return with_kd and objective.kd_divergence == "taid" and not self.evaluate.skip_train

    def teacher_parallel(self) -> ParallelConfig:
        """Return the teacher's layout: the student's unless its own sizes are given; never interleaved."""
        own, base = self.teacher, self.parallel
        tensor = own.tensor_model_parallel_size or base.tensor_model_parallel_size
        return ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=own.pipeline_model_parallel_size or base.pipeline_model_parallel_size,
            context_parallel_size=base.context_parallel_size,
            sequence_parallel=base.sequence_parallel and tensor > 1,
            distributed_timeout_minutes=base.distributed_timeout_minutes,
        )
