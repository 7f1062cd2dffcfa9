"""Warnings of libraries that every run would print and that no user can act on."""

from __future__ import annotations

import warnings

# Warnings that torch and megatron-core print when megatron-core runs.
_MESSAGES = (
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated and will be removed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"When using sequence parallelism it is recommended to set the environment variable",
)


def ignore_known_warnings() -> None:
    """Silence these warnings for the rest of the process; all others are still shown."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
