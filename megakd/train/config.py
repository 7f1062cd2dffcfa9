"""Everything a training run can be told, and what is refused before a process group exists. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config import group, option
from megakd.data.packing import Packing
from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.model.config import ModelConfig
from megakd.train.journal_config import LogitsSaveConfig
from megakd.train.kd_schedule import DecayShape, KDSchedule, Phases
from megakd.train.objective_config import ObjectiveConfig
from megakd.train.stores import WITHOUT

_MOST_SAMPLES, _MOST_SAMPLES_A_STEP = 2**62, 2**24


@dataclass
class TrainingConfig:
    train_iters: int = option(1000, "optimizer steps of the whole run", common=True)
    micro_batch_size: int = option(1, "samples a rank passes through the model at once", common=True)
    global_batch_size: int = option(8, "samples of one optimizer step, over all ranks", common=True)
    seed: int = option(1234, "seed of weights, data order and dropout", common=True)
    exit_interval: int | None = option(None, "save and stop after this many steps of this process")

    def validate(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
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
        if self.exit_interval is not None and self.exit_interval < 1:
            raise UsageError(f"--exit-interval is {self.exit_interval}; expected at least 1, or to be left out")

    def check_batch(self, data_parallel_size: int) -> None:
        """Refuse a global batch that does not split over data-parallel ranks."""
        piece = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % piece:
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size x data-parallel "
                f"size = {self.micro_batch_size} x {data_parallel_size} = {piece}"
            )


@dataclass
class DataConfig:
    data_path: list[str | float] = option([], "training data: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...", common=True)
    valid_data_path: list[str | float] = option([], "held-out data, in the same form", common=True)
    seq_length: int = option(1024, "tokens of one sample", common=True)
    packing: Packing = option(
        "concat", "samples are windows (concat), windows cut back to a sentence end, or documents", common=True
    )
    valid_packing: Packing | None = option(None, "the same for the held-out data (default: as --packing)")
    selection: list[str] = option(
        [],
        "train on these samples alone: a folder of 'megakd select' for each dataset, or 'all' for one used whole",
        common=True,
    )
    vocab_size: int | None = option(None, "true vocabulary (default: what the dataset's manifest records)")
    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"] | None
    ) = option(None, "for bits per byte (default: what the dataset's manifest records)")
    tokenizer_model: str | None = option(None, "model file of the tokenizer (default: as the manifest records)")
    eod_mask_loss: bool = option(False, "no loss on the token after an end of document")

    def validate(self) -> None:
        if not self.data_path:
            raise UsageError("missing --data-path: the prefix of a dataset made by 'megakd preprocess'")
        if self.seq_length < 1:
            raise UsageError(f"--seq-length is {self.seq_length}; expected at least 1")


@dataclass
class TeacherConfig:
    load: str | None = option(None, "teacher's checkpoint folder; its model is read from there", common=True)
    iteration: int | None = option(None, "which checkpoint of that folder (default: the latest)")
    tensor_model_parallel_size: int | None = option(None, "TP of the teacher (default: the student's)", common=True)
    pipeline_model_parallel_size: int | None = option(None, "PP of the teacher (default: the student's)", common=True)
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option("auto", "the teacher's layers")
    bf16: bool | None = option(None, "run the teacher in bfloat16 (default: as the student)")
    fp8_format: Literal["e4m3", "hybrid"] | None = option(None, "run the teacher in FP8 (Transformer Engine)")
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = option("tensorwise", "FP8 scaling of the teacher")
    logits_load_dir: list[str] = option(
        [],
        "targets from logits stores: a folder of 'megakd capture' for each dataset of --data-path, or 'none' for one "
        "without; what has no stored targets asks --teacher-load, or trains on the LM loss alone",
        common=True,
        flag="--logits-load-dir",
    )
    valid_logits_load_dir: list[str] = option([], "the same for --valid-data-path", flag="--valid-logits-load-dir")
    logits_load_decode_threads: int = option(
        1, "threads a rank that read and decode stored targets", flag="--logits-load-decode-threads"
    )
    logits_load_prefetch_depth: int = option(
        2, "microbatches whose stored targets are held ahead", flag="--logits-load-prefetch-depth"
    )

    @property
    def reads_stores(self) -> bool:
        """Whether any of the training data has stored targets."""
        return any(folder != WITHOUT for folder in self.logits_load_dir)

    @property
    def is_there(self) -> bool:
        """Whether there is anything to distil from."""
        return self.load is not None or self.reads_stores

    def validate(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                flag = f"--teacher-{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}; expected at least 1")
        if self.load is None and (self.tensor_model_parallel_size or self.pipeline_model_parallel_size):
            raise UsageError("a layout for the teacher is given but no teacher: add --teacher-load DIR")
        for name, least in (("logits_load_decode_threads", 1), ("logits_load_prefetch_depth", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected {least} or more")
        if self.logits_load_dir and not self.reads_stores:
            raise UsageError(f"--logits-load-dir names '{WITHOUT}' for every dataset: drop it")
        if self.valid_logits_load_dir and not self.is_there:
            raise UsageError("--valid-logits-load-dir without a teacher: add --logits-load-dir or --teacher-load")


@dataclass
class OptimConfig:
    lr: float = option(3e-4, "peak learning rate", common=True)
    min_lr: float = option(0.0, "learning rate at the end of the decay", common=True)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = option(
        "cosine", "decay after warm-up", common=True
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up from 0", common=True)
    lr_decay_iters: int | None = option(None, "step at which the decay ends (default: train-iters)")
    lr_wsd_decay_style: DecayShape = option("minus_sqrt", "shape of WSD's final decay (minus_sqrt: 1 - sqrt)")
    lr_wsd_decay_iters: int | None = option(None, "steps of WSD's final decay (default: a tenth of the run)")
    weight_decay: float = option(0.1, "decoupled weight decay; none on norms and biases", common=True)
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    clip_grad: float = option(1.0, "largest gradient norm; 0 for none", common=True)

    def validate(self) -> None:
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"--lr {self.lr} and --min-lr {self.min_lr}; expected 0 <= min-lr <= lr and lr > 0")
        for name in ("clip_grad", "weight_decay", "lr_warmup_iters"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 <= beta < 1")
        if not self.adam_eps > 0:
            raise UsageError(f"--adam-eps is {self.adam_eps}; expected a positive number")
        for name in ("lr_decay_iters", "lr_wsd_decay_iters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")

    def check_length(self, train_iters: int, *, with_phases: bool = False) -> None:
        """Refuse phases that do not fit into the run. with_phases: of WSD, whatever the learning rate's style."""
        end, decay = self.decay_iters(train_iters), self.wsd_decay_iters(train_iters)
        if self.lr_warmup_iters >= end:
            raise UsageError(f"--lr-warmup-iters {self.lr_warmup_iters} leaves nothing of the {end} decay steps")
        if (self.lr_decay_style == "WSD" or with_phases) and self.lr_warmup_iters + decay > end:
            raise UsageError(
                f"--lr-warmup-iters {self.lr_warmup_iters} + --lr-wsd-decay-iters {decay} exceed --lr-decay-iters {end}"
            )

    def phases(self, train_iters: int) -> Phases:
        """Those of the WSD style, whether it is chosen or not."""
        return Phases(
            end=self.decay_iters(train_iters),
            warmup=self.lr_warmup_iters,
            decay=self.wsd_decay_iters(train_iters),
            decay_style=self.lr_wsd_decay_style,
        )

    def decay_iters(self, train_iters: int) -> int:
        return self.lr_decay_iters or train_iters

    def wsd_decay_iters(self, train_iters: int) -> int:
        return self.lr_wsd_decay_iters or max(1, self.decay_iters(train_iters) // 10)


@dataclass
class CheckpointConfig:
    save: str | None = option(None, "folder for checkpoints, records and the resolved configuration", common=True)
    load: str | None = option(
        None, "folder to start from (default: continue in --save if it holds a checkpoint)", common=True
    )
    save_interval: int = option(1000, "steps between checkpoints; one more at the end", common=True)
    async_save: bool = option(False, "write checkpoints in the background")
    finetune: bool = option(False, "from --load take the weights only: new optimizer, step 0, first sample")

    def validate(self) -> None:
        if self.save_interval < 0:
            raise UsageError(f"--save-interval is {self.save_interval}; expected 0 (at the end alone) or more")


@dataclass
class EvaluateConfig:
    eval_interval: int = option(100, "steps between evaluations; one more at the end", common=True)
    eval_iters: int = option(10, "global batches of one evaluation, at most one pass over the data", common=True)
    skip_train: bool = option(False, "evaluate the checkpoint once: trains nothing, saves no checkpoint")

    def validate(self) -> None:
        if self.eval_iters < 1:
            raise UsageError(f"--eval-iters is {self.eval_iters}; expected at least 1")
        if self.eval_interval < 0:
            raise UsageError(f"--eval-interval is {self.eval_interval}; expected 0 (at the end alone) or more")


@dataclass
class LoggingConfig:
    log_interval: int = option(10, "steps between lines", common=True)
    tensorboard_dir: str | None = option(None, "folder for TensorBoard (default: SAVE/tensorboard)")
    wandb_project: str | None = option(None, "record the run in this project of Weights & Biases too")
    wandb_exp_name: str | None = option(None, "the run's name there (default: the name of the --save folder)")
    wandb_save_dir: str | None = option(None, "folder for its local files (default: SAVE)")
    wandb_entity: str | None = option(None, "user or team that the project belongs to (default: yours)")
    mlflow_tracking_uri: str | None = option(None, "record the run in this MLflow server or database too")
    mlflow_experiment: str | None = option(None, "MLflow's experiment for the run (default: Default)")
    mlflow_run_name: str | None = option(None, "the run's name there (default: the name of the --save folder)")

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
    """The root: groups in YAML, and one flat flag a leaf."""

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
        if self.evaluate.skip_train and not self.data.valid_data_path:
            raise UsageError("--skip-train only evaluates: it needs --valid-data-path")
        if self.teacher.valid_logits_load_dir and not self.data.valid_data_path:
            raise UsageError("--valid-logits-load-dir is for held-out data: add --valid-data-path")
        self._check_objective()
        with_phases = self.teacher.is_there and self.objective.has_phases
        self.optim.check_length(self.training.train_iters, with_phases=with_phases)
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
        """What alpha and the temperature are at each step; None where nothing is distilled."""
        if not self.teacher.is_there or self.objective.kd_alpha == 0:
            return None
        train_iters = self.training.train_iters
        return self.objective.schedule(train_iters, self.optim.phases(train_iters))

    @property
    def trains_taid(self) -> bool:
        """Whether the run keeps the state of taid."""
        objective = self.objective
        with_kd = self.teacher.is_there and objective.kd_alpha > 0
        return with_kd and objective.kd_divergence == "taid" and not self.evaluate.skip_train

    def teacher_parallel(self) -> ParallelConfig:
        """The teacher's layout: the student's unless its own sizes are given; never interleaved."""
        own, base = self.teacher, self.parallel
        tensor = own.tensor_model_parallel_size or base.tensor_model_parallel_size
        return ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=own.pipeline_model_parallel_size or base.pipeline_model_parallel_size,
            context_parallel_size=base.context_parallel_size,
            sequence_parallel=base.sequence_parallel and tensor > 1,
            distributed_timeout_minutes=base.distributed_timeout_minutes,
        )
