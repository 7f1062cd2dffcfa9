"""Choice of the parts of a teacher that a student keeps, by their importance. Pure, without torch.

Axes: ``L`` layers of the student, ``A`` query heads, ``G`` key/value heads, ``F`` neurons, ``H`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megakd.model.config import ModelShape
from megakd.pipeline.prune.artefact import Importance

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """Numbers of the teacher's parts that stay, rising: the student's parts stand in the teacher's order.

    groups_LG: key/value heads of each layer. heads_LA: query heads, those of one key/value head together.
    """

    layers_L: Indices
    groups_LG: Indices
    heads_LA: Indices
    neurons_LF: Indices
    channels_H: Indices


def choose(
    importance: Importance,
    teacher: ModelShape,
    student: ModelShape,
    *,
    layer_choice: Literal["influence", "even"],
    prune_layers: Sequence[int] | None = None,
) -> Choice:
    """Choose the most important parts, as many as the student has; of equal ones the first.

    Heads and neurons are ranked within each layer, channels over the whole model (Minitron, arXiv 2407.14679, section
    2.2). Of grouped query heads, first the key/value heads with the largest sum of importance over their query heads
    stay, then the same number of query heads of each. prune_layers: layers that go, in place of ``layer_choice``.
    """
    layers_L = _layers(importance, student.num_layers, layer_choice, prune_layers)
    shared = teacher.num_attention_heads // teacher.num_query_groups
    grouped_LGA = importance.heads_LA[layers_L].reshape(len(layers_L), teacher.num_query_groups, shared)
    groups_LG = _best(grouped_LGA.sum(-1), student.num_query_groups)
    of_kept_LGA = np.take_along_axis(grouped_LGA, groups_LG[..., None], axis=1)
    within_LGA = _best(of_kept_LGA, student.num_attention_heads // student.num_query_groups)
    heads_LA = (groups_LG[..., None] * shared + within_LGA).reshape(len(layers_L), -1)
    return Choice(
        layers_L,
        groups_LG,
        heads_LA,
        _best(importance.neurons_LF[layers_L], student.ffn_hidden_size),
        _best(importance.channels_H, student.hidden_size),
    )


def _layers(
    importance: Importance, count: int, choice: Literal["influence", "even"], dropped: Sequence[int] | None
) -> Indices:
    num_layers = len(importance.layers_L)
    if dropped is not None:
        return np.setdiff1d(np.arange(num_layers), dropped)
    if choice == "influence":
        return _best(importance.layers_L, count)
    if count == 1:
        return np.zeros(1, np.int64)
    # the first and the last layer, and evenly spaced ones between
    return np.round(np.linspace(0, num_layers - 1, count)).astype(np.int64)


def _best(values: NDArray[np.float64], count: int) -> Indices:
    """Places of the ``count`` largest along the last axis, rising; of equal values the first."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int64)
