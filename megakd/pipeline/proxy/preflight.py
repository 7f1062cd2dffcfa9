"""Flags of ``megakd proxy`` checked against scores, dataset and model on disk: every refusal, without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.config.tree import option
from megakd.data.loader import check_vocabulary
from megakd.data.order import permute
from megakd.data.samples.packing import Packing
from megakd.data.samples.protocol import Samples
from megakd.data.scores.artefact import Scores
from megakd.data.scores.sources import open_sources, outdated
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.layout import ParallelConfig
from megakd.model.checkpoint.record import CheckpointRecord, latest_iteration, read_record
from megakd.model.config import ModelShape
from megakd.model.proxy.artefact import FORMAT, MANIFEST, VERSION
from megakd.pipeline.frozen.checks import common_tokenizer, skipped_token

_SETTINGS = (
    "teacher_scale", "held_out_fraction", "ratio", "epochs", "patience", "global_batch_size", "lr", "warmup_fraction",
    "weight_decay", "clip_grad", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class ProxyConfig:
    """The flags of ``megakd proxy``."""

    load: str = option(
        ...,
        "small model to begin with, such as the reference: a folder of checkpoints, or a Hugging Face folder",
    )
    teacher_scores: str = option(..., "the teacher's scores of a sample (megakd score --sample-fraction)")
    reference_scores: str = option(..., "the reference model's scores of the same sample")
    data_path: str = option(..., "the dataset that was scored: PREFIX, without .bin or .idx")
    output: str = option(..., "folder for the proxy; an unfinished fit in it is continued")
    seq_length: int | None = option(None, "tokens of one sample (default: as it was scored)", common=True)
    packing: Packing | None = option(None, "packing of the samples (default: as they were scored)", common=True)
    teacher_scale: float = option(1.0, "lambda in difference = NLL_reference - lambda * NLL_teacher", common=True)
    held_out_fraction: float = option(
        0.1, "share of the sample that is held out: judged by, never trained on", common=True
    )
    ratio: float = option(0.5, "share to keep, for the agreement of predictions with the truth", common=True)
    epochs: int = option(5, "largest number of passes over the sample", common=True)
    patience: int = option(2, "epochs in a row without a better one after which the fit ends", common=True)
    micro_batch_size: int = option(4, "samples that a rank passes through the model at once", common=True)
    global_batch_size: int = option(32, "samples of one update, over all ranks", common=True)
    lr: float = option(1e-4, "peak learning rate; warms up, then falls to 0 over all epochs", common=True)
    warmup_fraction: float = option(0.05, "share of the updates that warm up")
    weight_decay: float = option(0.01, "weight decay of matrices")
    clip_grad: float = option(1.0, "largest norm of a gradient")
    seed: int = option(1234, "seed of the held-out part, and of the order of samples", common=True)
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)")
    save_interval: int = option(0, "updates between checkpoints, beside those after each epoch; 0: none")
    log_interval: float = option(10.0, "seconds between progress lines", common=True)
    vocab_size: int | None = option(
        None, "number of ids (default: the tokenizer's); the rows that the model has from there on are padding"
    )
    tokenizer_model: str | None = option(
        None, "path of the tokenizer, if it was moved; sentence packing that is not on disk yet needs it"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "implementation of the model's layers"
    )
    distributed_timeout_minutes: float = option(10.0, "longest wait of a collective; a longer one is an error")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("epochs", "patience", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("save_interval", "log_interval", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 or more")
        for name in ("lr", "clip_grad"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected more than 0")
        for name in ("held_out_fraction", "ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; expected a share between 0 and 1"
                )
        if not 0 <= self.warmup_fraction < 1:
            raise UsageError(f"--warmup-fraction is {self.warmup_fraction}; expected a share from 0 to below 1")
        self.parallel().validate()

    def parallel(self) -> ParallelConfig:
        """The parallel layout: data parallelism alone."""
        return ParallelConfig(distributed_timeout_minutes=self.distributed_timeout_minutes)


@dataclass(frozen=True)
class Portion:
    """The trained part of the sample, or the held-out part."""

    ids: NDArray[np.int64]
    """``[n]``: sample ids, ascending."""
    difference: NDArray[np.float64]
    """``[n]``: NLL of the reference - lambda * NLL of the teacher, nats a token."""
    reference_nll: NDArray[np.float64]
    """``[n]``: nats a token."""


@dataclass(frozen=True)
class ProxyPlan:
    """The configuration checked against what is on disk."""

    record: CheckpointRecord
    """The model to begin with."""
    shape: ModelShape
    """Shape of the model in the fit: fp32, no dropout."""
    samples: Samples
    mask_policy: str
    eod_token: int | None
    """Id that ends a document, beside the index; None if the mask policy does not ask."""
    tokenizer: dict[str, Any] | None
    trained: Portion
    held_out: Portion
    settings: dict[str, Any]
    parents: dict[str, str]
    resume: CheckpointRecord | None
    finished: Manifest | None

    @property
    def identity(self) -> dict[str, Any]:
        """Settings and inputs that a fit depends on; a run that continues must have the same."""
        return {"settings": self.settings, "parents": self.parents}


def check_proxy(config: ProxyConfig) -> ProxyPlan:
    """Refuse what cannot work, and return what the rest of the run needs to know.

    Raises MismatchError for scores, dataset and model that do not belong together or another fit in ``--output``,
    UsageError for too few scored samples, CorruptError for scores that are not finite.
    """
    record = read_record(config.load, config.iteration, role="--load", flag="--iteration")
    folders = {"teacher": config.teacher_scores, "reference": config.reference_scores}
    _refuse_predictions(folders)
    (source,) = open_sources(
        {name: [folder] for name, folder in folders.items()},
        outputs=[config.output],
        data_path=[config.data_path],
        tokenizer_model=config.tokenizer_model,
    )
    samples, teacher, reference = source.samples, source.scores["teacher"], source.scores["reference"]
    assert samples is not None  # --data-path is given
    _check_scores(config, teacher, reference)
    if (warning := outdated(source)) is not None:
        raise MismatchError(f"{warning}: score anew")
    record, tokenizer = common_tokenizer(
        samples.dataset, record, tokenizer_model=config.tokenizer_model, vocab_size=config.vocab_size
    )
    check_vocabulary([samples], record.vocab_size)
    shape = dataclasses.replace(
        record.shape,
        transformer_impl=config.transformer_impl,
        bf16=False,  # the small updates of a fit vanish in it
        fp8_format=None,
        fp4_format=None,
        fp8_param_gather=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_aux_loss_coeff=0.0,
    )
    mask_policy = str(reference.manifest.parameters["mask_policy"])
    trained, held_out = _split(config, teacher, reference)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    parents = {
        "dataset": source.dataset,
        "initial model": record.fingerprint,
        "scores teacher": teacher.fingerprint,
        "scores reference": reference.fingerprint,
    }
    plan = ProxyPlan(
        record=record,
        shape=shape,
        samples=samples,
        mask_policy=mask_policy,
        eod_token=skipped_token(mask_policy, samples.dataset, tokenizer),
        tokenizer=tokenizer,
        trained=trained,
        held_out=held_out,
        settings=settings,
        parents=parents,
        resume=None,
        finished=None,
    )
    return _find_earlier(plan, Path(config.output))


def _refuse_predictions(folders: Mapping[str, str]) -> None:
    for name, folder in folders.items():
        if "predicts" in Scores(folder).manifest.parameters:
            raise UsageError(
                f"--{name}-scores {folder}: a proxy's predictions of the difference already; a proxy learns from the "
                "scores of two models"
            )


def _check_scores(config: ProxyConfig, teacher: Scores, reference: Scores) -> None:
    for scores in (teacher, reference):
        for key in ("packing", "seq_length"):
            scored, asked = scores.manifest.parameters[key], getattr(config, key)
            if asked is not None and asked != scored:
                raise MismatchError(
                    f"{scores.folder}: scored with {key} {scored}, --{key.replace('_', '-')} is {asked}: leave it out, "
                    "or score with it"
                )


def _split(config: ProxyConfig, teacher: Scores, reference: Scores) -> tuple[Portion, Portion]:
    """The trained and the held-out portion: a function of the scored ids, the fraction and the seed."""
    ids = np.flatnonzero(np.asarray(reference.counts) > 0)
    counts = reference.counts[ids].astype(np.float64)
    nlls = [-scores.log_probs[ids].astype(np.float64) / counts for scores in (teacher, reference)]
    nll_teacher, nll_reference = nlls
    difference = nll_reference - config.teacher_scale * nll_teacher
    if not np.isfinite(difference).all():
        bad = ids[~np.isfinite(difference)]
        raise CorruptError(
            f"{teacher.folder} and {reference.folder}: {len(bad)} samples have a score that is not finite: ids "
            f"{bad[:5].tolist()}; score them anew"
        )
    num_held_out = round(config.held_out_fraction * len(ids))
    if num_held_out < 2 or len(ids) - num_held_out < 2:
        raise UsageError(
            f"{reference.folder}: {len(ids)} scored samples, of which --held-out-fraction {config.held_out_fraction} "
            f"leaves {num_held_out} to judge by: score more (megakd score --sample-fraction)"
        )
    key = xxhash.xxh3_64_intdigest(f"held out {config.seed}".encode()) >> 2
    order = permute(np.arange(len(ids)), num_samples=len(ids), seed=key, epoch=0)
    portions = [
        Portion(ids[places], difference[places], nll_reference[places])
        for places in (np.sort(order[num_held_out:]), np.sort(order[:num_held_out]))
    ]
    for portion, name in zip(portions, ("train on", "judge by")):
        if not portion.difference.std() > 0:
            raise UsageError(
                f"{teacher.folder} and {reference.folder}: the difference is {portion.difference[0]:g} for all "
                f"{len(portion.ids)} samples to {name}: there is nothing to learn"
            )
    return portions[0], portions[1]


def _find_earlier(plan: ProxyPlan, folder: Path) -> ProxyPlan:
    """The plan, with the finished or unfinished fit in the folder. Raises MismatchError for a different fit."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: a file is there; expected a folder, new or there")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST, format=FORMAT, version=VERSION)
        parents = {name: fingerprint for name, fingerprint in manifest.parents.items() if name != "model"}
        _check_same(folder, {"settings": manifest.parameters["fit"], "parents": parents}, plan)
        return dataclasses.replace(plan, finished=manifest)
    if latest_iteration(folder) is None:
        return plan
    resume = read_record(folder, role="--output")
    if "fit" not in resume.loader_state:
        raise MismatchError(
            f"{resume.path}: a checkpoint of another kind of run; give a new --output (the model to begin with is "
            "--load)"
        )
    _check_same(folder, resume.loader_state["fit"], plan)
    return dataclasses.replace(plan, resume=resume)


def _check_same(folder: Path, there: dict[str, Any], plan: ProxyPlan) -> None:
    wrong = [
        f"{key}: {there[group].get(key)} there, {value} here"
        for group, values in plan.identity.items()
        for key, value in values.items()
        if there[group].get(key) != value
    ]
    if wrong:
        raise MismatchError(
            f"{folder} holds another fit than this: {'; '.join(wrong)}. Give another --output, or remove {folder} to "
            "fit anew"
        )


def steps_an_epoch(plan: ProxyPlan) -> int:
    """Updates in one pass over the trained portion; the last one may have fewer samples."""
    return math.ceil(len(plan.trained.ids) / int(plan.settings["global_batch_size"]))
