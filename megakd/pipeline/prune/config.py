"""Flags of ``megakd prune``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.pipeline.frozen.config import FrozenConfig

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
Aggregation = Literal["mean", "l2"]


@dataclass(frozen=True)
class PruneConfig(FrozenConfig):
    """Flags of ``megakd prune``."""

    load: str = option(
        ..., "the teacher: a folder of checkpoints of 'megakd train', or a Hugging Face folder", common=True
    )
    save: str = option(..., "folder for the student: a checkpoint of iteration 0, and what was measured", common=True)
    preset: str | None = option(
        None, "named shape whose sizes the student has; explicit sizes override it", common=True
    )
    num_layers: int | None = option(None, "transformer layers of the student (default: the teacher's)", common=True)
    hidden_size: int | None = option(
        None, "width of the student's residual stream (default: the teacher's)", common=True
    )
    ffn_hidden_size: int | None = option(
        None, "width of the student's feed-forward layers (default: the teacher's)", common=True
    )
    num_attention_heads: int | None = option(None, "query heads of the student (default: the teacher's)", common=True)
    num_query_groups: int | None = option(
        None,
        "key/value heads of the student (default: the teacher's; where each query head has its own, as many as those)",
        common=True,
    )
    layer_choice: Literal["influence", "even"] = option(
        "influence",
        "layers that are left out: those of the least influence, 1 - cos(input, output), or those between evenly "
        "spaced ones",
        common=True,
    )
    prune_layers: list[int] | None = option(
        None, "numbers of the layers that are left out, from 0; in place of --num-layers", common=True
    )
    calibration_samples: int = option(1024, "samples that importance is measured on, drawn by --seed", common=True)
    seed: int = option(1234, "seed of the calibration samples")
    sequence_aggregation: Aggregation = option(
        "mean", "aggregation of activations over a sample's tokens: mean of |a|, or square root of the sum of squares"
    )
    sample_aggregation: Aggregation = option("l2", "aggregation of that over the samples")
    rescale_norms: bool = option(
        True,
        "multiply norm weights by sqrt(teacher's hidden size / student's), so that a norm over fewer channels keeps "
        "its scale",
    )
    importance: str | None = option(
        None, "importance that an earlier run measured: its --save; nothing is measured anew (another student of it)"
    )
    iteration: int | None = option(None, "iteration of the checkpoint in --load (default: the latest)")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in (*SIZES, "calibration_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
        if self.transformer_impl == "transformer_engine" or self.fp8_format is not None:
            raise UsageError(
                "importance is read from inside megatron-core's local layers: leave --transformer-impl and "
                "--fp8-format out"
            )
        if self.prune_layers is not None and self.num_layers is not None:
            raise UsageError("--prune-layers and --num-layers: one of them says how many layers stay")
        if self.prune_layers is not None and len(set(self.prune_layers)) < len(self.prune_layers):
            raise UsageError(f"--prune-layers {' '.join(map(str, self.prune_layers))}: a number is there twice")
        super().validate()
