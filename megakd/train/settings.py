"""Settings that decide how a run trains, beside its model, data and schedules; changes are told when it goes on."""

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
_OF_THIS_PROCESS = {  # a longer run is the same run, except for a phase that ends with it
    "train_iters", "train_samples", "exit_interval", "exit_duration_in_mins",
}  # fmt: skip
_OF_THE_SCHEDULES = {  # the record of KDSchedule has these
    "kd_alpha", "kd_alpha_schedule", "kd_alpha_min", "lm_weight", "kd_temperature", "kd_temperature_schedule",
    "kd_temperature_min", "kd_schedule_iters", "kd_schedule_period",
}  # fmt: skip
_OF_THE_CODE = {"loss_implementation", "head_chunk_mbytes"}
_OF_THE_MODEL = (  # settings of a model that may change when its training goes on, and that change the updates
    "hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "fp8_format", "fp8_recipe", "fp8_param_gather",
    "fp4_format", "first_last_layers_bf16",
)  # fmt: skip


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that have an effect in this run, as plain data for the checkpoint's record.

    Keys are the names of the flags with underscores; defaults that depend on other options are resolved.
    """
    optim, lengths = config.optim, config.lr_lengths
    settings = {key: value for key, value in asdict(config.training).items() if key not in _OF_THIS_PROCESS}
    settings |= {
        key: value for key, value in asdict(optim).items() if not key.endswith(("_iters", "_samples", "_fraction"))
    }
    warmup = lengths.warmup
    settings[f"lr_warmup_{lengths.unit}"] = int(warmup) if warmup.is_integer() else warmup
    if optim.lr_decay_style == "WSD":
        settings[f"lr_wsd_decay_{lengths.unit}"] = lengths.wsd_decay
    else:
        del settings["lr_wsd_decay_style"]
    if optim.lr_decay_style == "constant":
        del settings["min_lr"]
    else:
        settings[f"lr_decay_{lengths.unit}"] = lengths.end
    if config.kd_schedule() is not None:
        settings |= asdict(config.objective)
    if config.trains_taid:
        settings["train_iters"] = config.training.train_iters
    settings |= {"z_loss_coeff": config.objective.z_loss_coeff, "rho_keep": config.objective.rho_keep}
    settings["eod_mask_loss"] = config.data.eod_mask_loss
    return {key: value for key, value in settings.items() if key not in _OF_THE_SCHEDULES | _OF_THE_CODE}


def changed_settings(settings: Mapping[str, Any], shape: ModelShape, resume: CheckpointRecord) -> list[str]:
    """Return the differences from the run that wrote the checkpoint, a sentence each with both values.

    settings: `settings_of` this run. A checkpoint of an older version does not record its settings: the configuration
    file beside it is compared instead.
    """
    tell = f"this run goes on with other settings than {resume.path}: {{}}".format
    old_shape, new_shape = asdict(resume.shape), asdict(shape)
    changes = _differences(
        {key: old_shape[key] for key in _OF_THE_MODEL}, {key: new_shape[key] for key in _OF_THE_MODEL}
    )
    then = resume.settings if resume.settings is not None else _settings_beside(resume.path.parent / _RESOLVED)
    if then is None:
        unknown = (
            f"{resume.path} does not tell what it was trained with, nor does a file beside it: nothing is compared"
        )
        return [*map(tell, changes), unknown]
    return [tell(change) for change in changes + _differences(then, settings)]


def keep_configuration(save: Path, text: str, *, first_step: int) -> None:
    """Write the resolved configuration of the steps from ``first_step`` on, and keep those of the steps before.

    ``config.yaml`` is the latest. ``configs/from_iter_0000101.yaml`` is the configuration of step 101 and later steps,
    up to the next file; a file is written when the configuration changes. Files of steps that come again are removed.
    """
    folder, latest = save / _SEGMENTS, save / _RESOLVED
    folder.mkdir(parents=True, exist_ok=True)
    before = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("from_iter_*.yaml")}
    for step in sorted(before):
        if step >= first_step:
            before.pop(step).unlink()
    if not before and first_step > 1 and latest.exists():  # an older version kept only the latest
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
    except (OSError, UsageError, yaml.YAMLError, TypeError, ValueError):  # missing, or of another version
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"--{key.replace('_', '-')}: {old.get(key, 'without effect')} there, {new.get(key, 'without effect')} here"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
