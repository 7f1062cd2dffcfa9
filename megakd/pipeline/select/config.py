"""The flags of ``megakd select``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError

REST = "other"
"""The domain of samples that no range of a --domains file holds."""
RANKS_ARE_BINNED = (
    "--rank-difference: the ranks are of bins, which the first 20 bits of the fp32 NLLs make (at most 1/2048 of an NLL "
    "wide), and linear inside a bin: a rank is off by up to the share of samples in its bin"
)
"""A note that is printed with such a selection; ``docs/formats.md`` defines the ranks exactly."""


@dataclass(frozen=True)
class SelectConfig:
    """The scores to select by, the weights that make one score of them, and how much to keep."""

    output: list[str] = option(
        ..., "folder for the selection; with several datasets one for each, in the order of the first model's scores"
    )
    teacher_scores: list[str] = option([], "the teacher's scores: a folder for each dataset", common=True)
    reference_scores: list[str] = option([], "the reference model's scores: a folder for each dataset", common=True)
    teacher_scale: float = option(1.0, "lambda in score = NLL_reference - lambda * NLL_teacher", common=True)
    proxy_scores: list[str] = option(
        [],
        "a proxy's predictions ('megakd score --proxy') instead; short for --scores proxy=DIR --weights proxy=-1",
        common=True,
    )
    scores: list[str] = option(
        [], "scores of any models instead: NAME=FOLDER, each name once for each dataset", common=True
    )
    weights: list[str] = option([], "weights of --scores: NAME=WEIGHT; score = sum of weight * NLL", common=True)
    normalise: Literal["token", "sample", "byte"] = option(
        "token", "unit that NLLs are per: token, sample or byte", common=True
    )
    rank_difference: bool = option(
        False,
        "ranks of the NLLs among the samples, 0 to 1, are weighed instead; ranks are those of bins, at most 1/2048 of "
        "an NLL wide, and linear inside a bin",
        common=True,
    )
    ratio: float = option(0.5, "share to keep, those with the largest scores; above 0, at most 1", common=True)
    ratio_of: Literal["samples", "tokens"] = option(
        "samples", "unit of --ratio: a share of the samples, or of their tokens", common=True
    )
    allocation: Literal["global", "equal", "quota"] = option(
        "global", "rule between domains: one threshold for all, the same ratio of each, or --quota", common=True
    )
    quota: list[str] = option([], "shares of the selection by domain: DOMAIN=SHARE, 1 in sum")
    floor: list[str] = option([], "least share to keep of a domain: DOMAIN=RATIO (allocation global)")
    cap: list[str] = option([], "largest share to keep of a domain: DOMAIN=RATIO (allocation global)")
    domains: str | None = option(
        None, "file of lines NAME FIRST STOP, ranges of documents (default: each dataset is a domain, by its folder)"
    )
    exclude_ids: list[str] = option(
        [], "samples never to keep: selections, or files of sample ids (.npy, or one id in a line)", common=True
    )
    drop_negative: bool = option(False, "samples with a score below 0 are never kept", common=True)
    drop_top_fraction: float = option(0.0, "share of the samples never to keep, those with the largest scores")
    gumbel_temperature: float = option(
        0.0, "temperature of a soft selection: Gumbel noise is added to score / it; 0: none", common=True
    )
    seed: int = option(1234, "seed of the order of ties and of the noise", common=True)
    data_path: list[str] = option([], "the datasets; for --domains, --materialize and --normalise byte", common=True)
    tokenizer_model: str | None = option(None, "tokenizer's file, for bytes (default: as the manifest records)")
    materialize: list[str] = option([], "prefixes of datasets to write the kept samples to as well", common=True)
    threads: int = option(0, "threads that read scores; 0: one for each core")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work, whatever the scores."""
        if not 0 < self.ratio <= 1:
            raise UsageError(
                f"--ratio {self.ratio}: expected more than 0 (a selection that keeps nothing trains nothing) and at "
                "most 1 (there is nothing to keep twice)"
            )
        if not 0 <= self.drop_top_fraction < 1:
            raise UsageError(f"--drop-top-fraction {self.drop_top_fraction}: expected a share from 0 to below 1")
        if self.gumbel_temperature < 0:
            raise UsageError(f"--gumbel-temperature {self.gumbel_temperature}: expected 0 for none, or more")
        if self.threads < 0:
            raise UsageError(f"--threads {self.threads}: expected 0 or more")
        if (self.allocation == "quota") != bool(self.quota):
            raise UsageError("--allocation quota and --quota DOMAIN=SHARE ... go together")
        if (self.floor or self.cap) and self.allocation != "global":
            raise UsageError(f"--floor and --cap bound --allocation global, not {self.allocation}")
        if (self.materialize or self.domains or self.normalise == "byte") and not self.data_path:
            raise UsageError("--materialize, --domains and --normalise byte read the datasets: add --data-path PREFIX")
        for flag, paths in (("--materialize", self.materialize), ("--data-path", self.data_path)):
            if paths and len(paths) != len(self.output):
                raise UsageError(f"{flag} has {len(paths)} entries, --output {len(self.output)}: one for each dataset")
        for paths in (self.output, self.materialize):
            if len({os.path.realpath(path) for path in paths}) != len(paths):
                raise UsageError(f"{' '.join(paths)}: expected different outputs")
        self._check_places()
        if self.domains and len(self.output) > 1:
            raise UsageError("--domains names documents of one dataset; with several, each dataset is a domain")
        self.models()

    def _check_places(self) -> None:
        """Raise UsageError for outputs that cannot be written, or that would replace what is read."""
        for path in self.output:
            if not path or (os.path.exists(path) and not os.path.isdir(path)):
                raise UsageError(f"--output '{path}': expected a folder, new or there")
        read = {os.path.realpath(path) for path in self.data_path}
        for path in self.materialize:
            if os.path.realpath(path) in read:
                raise UsageError(f"--materialize {path}: the output is one of the datasets that are read; name another")
            if not os.path.basename(path) or not os.path.isdir(os.path.dirname(path) or "."):
                raise UsageError(f"--materialize '{path}': expected FOLDER/NAME, in a folder that is there")

    @property
    def weights_given(self) -> str:
        """The flag that weighs the models, with its value."""
        return (
            f"--teacher-scale {self.teacher_scale:g}" if self.teacher_scores else f"--weights {' '.join(self.weights)}"
        )

    def models(self) -> dict[str, tuple[float, list[str]]]:
        """Model -> its weight and its folders; the first model's folders are in the order of the outputs.

        Raises UsageError for flags that name no model, or models in two ways.
        """
        pair = bool(self.teacher_scores or self.reference_scores)
        if self.proxy_scores:
            if pair or self.scores or self.weights:
                raise UsageError("--proxy-scores stand for the difference of two models' scores: give no others")
            return {"proxy": (-1.0, self.proxy_scores)}
        if pair and (self.scores or self.weights):
            raise UsageError("give --teacher-scores and --reference-scores, or --scores and --weights, not both")
        if pair and not (self.teacher_scores and self.reference_scores):
            raise UsageError(
                "--teacher-scores and --reference-scores go together; one model alone: --scores, --weights"
            )
        if pair:
            return {
                "teacher": (-self.teacher_scale, self.teacher_scores),
                "reference": (1.0, self.reference_scores),
            }
        folders: dict[str, list[str]] = {}
        for entry in self.scores:
            name, folder = split_pair(entry, "--scores")
            folders.setdefault(name, []).append(folder)
        weights = read_numbers(self.weights, "--weights")
        if not folders or set(folders) != set(weights):
            raise UsageError(
                "which scores? --teacher-scores DIR --reference-scores DIR, or --scores NAME=DIR ... with --weights "
                f"NAME=W ... for the same names (--scores: {sorted(folders)}, --weights: {sorted(weights)})"
            )
        return {name: (weights[name], folders[name]) for name in folders}


def read_numbers(entries: Sequence[str], flag: str) -> dict[str, float]:
    """Read ``NAME=NUMBER`` entries. Raises UsageError for anything else."""
    numbers: dict[str, float] = {}
    for entry in entries:
        name, text = split_pair(entry, flag)
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not abs(number) < float("inf") or name in numbers:
            raise UsageError(f"{flag} {entry}: expected NAME=NUMBER, each name once")
        numbers[name] = number
    return numbers


def split_pair(entry: str, flag: str) -> tuple[str, str]:
    """Split ``NAME=REST``, neither of them empty. Raises UsageError."""
    name, equals, rest = entry.partition("=")
    if not (name and equals and rest):
        raise UsageError(f"{flag} {entry}: expected NAME=VALUE")
    return name, rest
