"""What decides how a run trains, beside its model, its data and its schedules: told when a run goes on with another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megakd.artefacts.manifest import atomic_write
from megakd.config.tree import from_dict
from megakd.errors import UsageError
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.config import ModelShape
from megakd.train.config import TrainConfig

_RESOLVED = "config.yaml"
_SEGMENTS = "configs"
_OF_THIS_PROCESS = {  # a longer run is no other one, but where a phase ends with it
    "train_iters", "train_samples", "exit_interval", "exit_duration_in_mins",
}  # fmt: skip
_OF_THE_SCHEDULES = {  # the record of KDSchedule tells these
    "kd_alpha", "kd_alpha_schedule", "kd_alpha_min", "lm_weight", "kd_temperature", "kd_temperature_schedule",
    "kd_temperature_min", "kd_schedule_iters", "kd_schedule_period",
}  # fmt: skip
_OF_THE_CODE = {"loss_implementation", "head_chunk_mbytes"}
_OF_THE_MODEL = (  # what may change of a model when its training goes on, and changes the updates
    "hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "fp8_format", "fp8_recipe", "fp8_param_gather",
    "fp4_format", "first_last_layers_bf16",
)  # fmt: skip


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that have an effect in this run, with the values that defaults come to, by the names of the flags
    with underscores. Plain data, for the checkpoint's record."""
    optim, lengths = config.optim, config.lr_lengths
    found = {key: value for key, value in asdict(config.training).items() if key not in _OF_THIS_PROCESS}
    found |= {
        key: value for key, value in asdict(optim).items() if not key.endswith(("_iters", "_samples", "_fraction"))
    }
    warmup = lengths.warmup
    found[f"lr_warmup_{lengths.unit}"] = int(warmup) if warmup.is_integer() else warmup
    if optim.lr_decay_style == "WSD":
        found[f"lr_wsd_decay_{lengths.unit}"] = lengths.wsd_decay
    else:
        del found["lr_wsd_decay_style"]
    if optim.lr_decay_style == "constant":
        del found["min_lr"]
    else:
        found[f"lr_decay_{lengths.unit}"] = lengths.end
    if config.kd_schedule() is not None:
        found |= asdict(config.objective)
    if config.trains_taid:
        found["train_iters"] = config.training.train_iters
    found |= {"z_loss_coeff": config.objective.z_loss_coeff, "rho_keep": config.objective.rho_keep}
    found["eod_mask_loss"] = config.data.eod_mask_loss
    return {key: value for key, value in found.items() if key not in _OF_THE_SCHEDULES | _OF_THE_CODE}


def changed_settings(settings: Mapping[str, Any], shape: ModelShape, resume: CheckpointRecord) -> list[str]:
    """What differs from the run that wrote the checkpoint, a sentence each with both values.

    A checkpoint that does not record its settings is older than their record: the configuration beside it is taken.
    """
    tell = f"this run goes on with other settings than {resume.path}: {{}}".format
    there, here = asdict(resume.shape), asdict(shape)
    found = _differences({key: there[key] for key in _OF_THE_MODEL}, {key: here[key] for key in _OF_THE_MODEL})
    then = resume.settings if resume.settings is not None else _settings_beside(resume.path.parent / _RESOLVED)
    if then is None:
        unknown = (
            f"{resume.path} does not tell what it was trained with, nor does a file beside it: nothing is compared"
        )
        return [*map(tell, found), unknown]
    return [tell(change) for change in found + _differences(then, settings)]


def keep_configuration(save: Path, text: str, *, first_step: int) -> None:
    """Write the resolved configuration of the steps from ``first_step`` on, and leave those of the steps before.

    ``config.yaml`` is the latest. ``configs/from_iter_0000101.yaml`` is that of step 101 and of those behind it, up to
    the next file; one is written where the configuration is another than before. Steps that come again lose theirs.
    """
    folder, latest = save / _SEGMENTS, save / _RESOLVED
    folder.mkdir(parents=True, exist_ok=True)
    before = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("from_iter_*.yaml")}
    for step in sorted(before):
        if step >= first_step:
            before.pop(step).unlink()
    if not before and first_step > 1 and latest.exists():  # of a version that kept no more than the latest
        before[1] = folder / _segment(1)
        atomic_write(before[1], latest.read_bytes())
    if not before or before[max(before)].read_text() != text:
        atomic_write(folder / _segment(first_step), text.encode())
    atomic_write(latest, text.encode())


def _segment(step: int) -> str:
    return f"from_iter_{step:07d}.yaml"


def _settings_beside(path: Path) -> dict[str, Any] | None:
    try:
        return settings_of(from_dict(TrainConfig, yaml.safe_load(path.read_text())))
    except (OSError, UsageError, yaml.YAMLError, TypeError, ValueError):  # not there, or of another version
        return None


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"--{key.replace('_', '-')}: {there.get(key, 'without effect')} there, {here.get(key, 'without effect')} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
