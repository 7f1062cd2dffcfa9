"""Reading of a launch line of Megatron-LM: its flags translated into ours, refusals, and notes for the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from megakd.config.command_line import Given, Line, Takes, Translation
from megakd.layout import is_first_rank
from megakd.train.megatron.defaults import DEFAULTS, tell_difference
from megakd.train.megatron.machine_flags import ELSEWHERE, KERNELS, LAYOUT
from megakd.train.megatron.model_flags import EXPERTS, MODEL, PRECISION
from megakd.train.megatron.training_flags import CHECKPOINTS, DATA, RECORD, STEPS
from megakd.train.megatron.verdicts import Entry, Reader, Reading, flags_of

TABLES: Mapping[str, tuple[Entry, ...]] = MappingProxyType(
    {
        "the model": MODEL, "experts": EXPERTS, "precision": PRECISION, "steps and the optimizer": STEPS,
        "data and tokenizers": DATA, "checkpoints": CHECKPOINTS, "the record": RECORD, "layout": LAYOUT,
        "kernels": KERNELS,
    }
)  # fmt: skip
_ENTRIES: Mapping[str, Entry] = MappingProxyType({entry.flag: entry for table in TABLES.values() for entry in table})

_FILE = "give the tokenizer as one file: --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
_TOKENIZERS: Mapping[str, Reading] = MappingProxyType(
    {
        "Llama2Tokenizer": Reading(flags_of(["--tokenizer-type", "SentencePieceTokenizer"])),
        "GPTSentencePieceTokenizer": Reading(flags_of(["--tokenizer-type", "SentencePieceTokenizer"])),
        "GPT2BPETokenizer": Reading(refused=f"GPT-2's vocabulary and merges are two files there; {_FILE}"),
        "Llama3Tokenizer": Reading(refused=f"it is a tiktoken file; {_FILE}"),
        "TikTokenizer": Reading(refused=f"it is a tiktoken file; {_FILE}"),
        "BertWordPieceLowerCase": Reading(refused="there is no BERT here"),
        "BertWordPieceCase": Reading(refused="there is no BERT here"),
        "MultimodalTokenizer": Reading(refused="there are no images here"),
        "NullMultimodalTokenizer": Reading(refused="there are no images here"),
        "SFTTokenizer": Reading(refused="there is no fine-tuning on chats here"),
    }
)


def _sequence_parallel(words: tuple[str, ...], line: Line) -> Reading:
    size = line.number("--tensor-model-parallel-size", "parallel.tensor_model_parallel_size") or 1
    if size == 1 and words != ("false",):
        return Reading(note="left out, as Megatron does: --tensor-model-parallel-size is 1")
    return Reading([Given("--sequence-parallel", words)])


def _fp8_param_gather(words: tuple[str, ...], line: Line) -> Reading:
    if words == ("false",):
        return Reading()
    return Reading(note="left out: parameters are kept and gathered in bf16, and products are in FP8 all the same")


def _num_experts(words: tuple[str, ...], line: Line) -> Reading:
    return Reading() if words == ("0",) else Reading([Given("--num-experts", words)])


def _normalization(words: tuple[str, ...], line: Line) -> Reading:
    return Reading(refused=f"LayerNorm is not built here: {_FAMILY}")


_FAMILY = (
    "models are decoders of the Llama and Qwen family, with RMSNorm, SwiGLU, rotary positions and no linear biases"
)
# Flags that both programs have, with the values whose meaning differs; None: any value.
_OWN: Mapping[str, tuple[tuple[str, ...] | None, Reader]] = MappingProxyType(
    {
        "--sequence-parallel": (None, _sequence_parallel),
        "--fp8-param-gather": (None, _fp8_param_gather),
        "--num-experts": (("0",), _num_experts),
        "--normalization": (("LayerNorm",), _normalization),
        "--tokenizer-type": (tuple(_TOKENIZERS), lambda words, line: _TOKENIZERS[words[0]]),
    }
)


class MegatronFlags:
    """The dialect of Megatron-LM's ``pretrain_gpt.py``."""

    def takes(self, name: str) -> Takes | None:
        """Return the form of a flag's value; None for a flag that Megatron-LM does not have."""
        entry = find(name)
        return None if entry is None else entry.takes

    def reads_itself(self, given: Given) -> bool:
        """Return True if this use of a flag that we have too has another meaning here."""
        values, _ = _OWN.get(given.name, ((), None))
        return values is None or given.values[:1] in [(value,) for value in values]

    def translate(self, line: Line) -> Translation:
        """Translate every flag of Megatron-LM's in the line. Only the first rank has notes."""
        translated: list[Given] = []
        refused: list[str] = []
        quiet: list[str] = []
        notes: list[str] = []
        for given in line.flags:
            entry, use = find(given.name), _OWN[given.name][1] if self.reads_itself(given) else None
            if entry is None and use is None:
                continue
            reading = (use or entry.read)(given.values, line)  # type: ignore[union-attr]
            translated += reading.flags
            if reading.refused:
                refused.append(" ".join([given.name, *given.values]) + f": {reading.refused}")
            elif reading.note:
                notes.append(f"{given.name}: {reading.note}")
            elif entry is not None and entry.verdict == "same":
                quiet.append(given.name)
        refused = [*_refuse_gpt(line), *refused]  # refusals of the model itself come first
        if not is_first_rank():
            return Translation(translated, refused)
        if quiet:
            notes.append(f"as here anyway, or without effect on the result: {' '.join(dict.fromkeys(quiet))}")
        if quiet or notes:
            left = [tell_difference(row) for row in DEFAULTS if row.matters and not row.is_given(line)]
            notes += [f"left to defaults that are not Megatron's: {'; '.join(left)}"] if left else []
            notes.append("every flag of Megatron's with its meaning here: --help-megatron")
        return Translation(translated, refused, notes)


def find(name: str) -> Entry | None:
    """Return the table's row of a flag, or one made for the group that it belongs to; None for an unknown flag."""
    if name in _ENTRIES:
        return _ENTRIES[name]
    reason = next((text for start, text in ELSEWHERE.items() if name.startswith(start)), None)
    if reason is None:
        return None
    return Entry(name, "refused", reason, "many", lambda words, line: Reading(refused=reason))


def _refuse_gpt(line: Line) -> list[str]:
    """Refuse a line that gives the number of positions without rotary ones: it means the position table of GPT-3."""
    rotary = ("--position-embedding-type", "--use-rotary-position-embeddings", "--no-position-embedding")
    described = any(re.match(r"student\.", key) for key in line.files) or line.has("--preset")
    if described or not line.has("--max-position-embeddings") or any(map(line.has, rotary)):
        return []
    absent = {
        "learned positions": ("--position-embedding-type rope", True),
        "LayerNorm": ("--normalization RMSNorm", not line.has("--normalization")),
        "GELU": ("--swiglu", not line.has("--swiglu")),
        "biases": ("--disable-bias-linear", not line.has("--disable-bias-linear")),
    }
    parts = {part: flag for part, (flag, missing) in absent.items() if missing}
    return [
        f"by Megatron's defaults this is a model with {', '.join(parts)}, as GPT-3 is; {_FAMILY}. If one of those is "
        f"meant, say so: {' '.join(parts.values())}"
    ]
