"""The form of a family's table: a row for each tensor of a Hugging Face folder, and the defaults of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megakd.model.config import ModelShape

Place = Literal["whole", "query", "key", "value", "gate", "up", "vocabulary"]
"""Place of a tensor's rows among those of ours: all of them, in order; a part of every key/value group (queries, key,
value); the first or the second half; all of them, with padding behind."""
Axis = Literal["vocabulary", "hidden", "query", "key", "head", "ffn", "experts", "expert_ffn"]


_OPTIONAL = ("sliding_window", "no_rope_freq", "moe_router_pre_softmax", "moe_shared_expert_intermediate_size")


@dataclass(frozen=True)
class TensorRow:
    """A tensor of a Hugging Face folder, and the tensor of a checkpoint that its rows lie in.

    theirs, ours: names, with ``{layer}`` and ``{expert}`` for numbers. Checkpoints stack layers and experts: the name
    there lacks ``.{layer}``, and an expert is an index (`ours` never has ``{expert}``). axes: the sizes of theirs.
    when: only models with a head of their own have it.
    """

    theirs: str
    ours: str
    place: Place
    axes: tuple[Axis, ...]
    when: Literal["always", "untied"] = "always"


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a model: a row of the table with its numbers filled in.

    ours: with the layer's number; ``expert`` is the index of the expert in it, None for a tensor without experts.
    """

    theirs: str
    ours: str
    place: Place
    expert: int | None
    size: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A class of transformers' that the models here can compute.

    model_type, architecture: as ``config.json`` names them. defaults: values of the class for keys that may be absent.
    expected: key -> the values that models here have, and the meaning of any other one. values: options of
    ``ModelConfig`` beyond those that all families share. window: tokens of the sliding window; None for no window.

    keys: the inverse of values and window, what a shape comes to in a ``config.json`` that is written. fixed: values
    there of keys that all models here share. optional: options of a shape, beyond those of all families, that the class
    can have. whole_heads: the class refuses a width that its heads do not divide, even with ``head_dim``.
    """

    model_type: str
    architecture: str
    rows: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    default_rope_theta: float
    expected: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    values: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    window: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    keys: Callable[[ModelShape], dict[str, Any]] = lambda shape: {}
    fixed: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    whole_heads: bool = False

    def tensors(self, shape: ModelShape, vocab_rows: int) -> Iterator[HfTensor]:
        """Yield every tensor of a model of ``shape`` whose embedding has ``vocab_rows`` rows, layer by layer."""
        sizes = axis_sizes(shape, vocab_rows)
        rows = [row for row in self.rows if row.when == "always" or not shape.tied]
        for row in rows:
            if "{layer}" not in row.theirs:
                yield _filled(row, sizes, None, None)
        for layer in range(shape.num_layers):
            for row in rows:
                if "{layer}" in row.theirs:
                    experts = range(shape.num_experts or 0) if "{expert}" in row.theirs else [None]
                    for expert in experts:
                        yield _filled(row, sizes, layer, expert)

    def lacks(self, shape: ModelShape) -> str | None:
        """Return the field of ``shape``, with its value, that the class cannot have; None if it can have all."""
        for name in _OPTIONAL:
            if getattr(shape, name) and name not in self.optional:
                return f"{name} is {getattr(shape, name)}"
        if shape.rotary_percent != 1:
            return f"rotary_percent is {shape.rotary_percent}, its heads are rotated whole"
        if self.whole_heads and shape.hidden_size % shape.num_attention_heads:
            return f"hidden_size {shape.hidden_size} is not a multiple of num_attention_heads"
        return None


def axis_sizes(shape: ModelShape, vocab_rows: int) -> dict[Axis, int]:
    """Return the sizes of the axes of a model's tensors."""
    return {
        "vocabulary": vocab_rows,
        "hidden": shape.hidden_size,
        "query": shape.num_attention_heads * shape.kv_channels,
        "key": shape.num_query_groups * shape.kv_channels,
        "head": shape.kv_channels,
        "ffn": shape.ffn_hidden_size,
        "experts": shape.num_experts or 0,
        "expert_ffn": shape.moe_ffn_hidden_size,
    }


def _filled(row: TensorRow, sizes: Mapping[Axis, int], layer: int | None, expert: int | None) -> HfTensor:
    numbers = {"{layer}": layer, "{expert}": expert}
    theirs, ours = row.theirs, row.ours
    for text, number in numbers.items():
        theirs, ours = theirs.replace(text, str(number)), ours.replace(text, str(number))
    return HfTensor(theirs, ours, row.place, expert, tuple(sizes[axis] for axis in row.axes))
