"""The whole of MiniPLM on a corpus with noise planted in it: is the noise dropped, and does that help? See ``main``.

Environment: MINIPLM_SEED (1234), MINIPLM_STEPS (400, a student's; the teacher gets 5/2 and a reference 5/4 of them),
MINIPLM_OUT (demo-out, whose text is shared with the demo). A stage whose result is there is skipped: a second call
continues.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))  # the corpus, and how stages run

import figures
import noise
import numpy as np
from planted import read_planted, sample_kinds
from stages import Word, begin, megakd, megakd_on_two_ranks, stage, trained
from text import TOKENIZER, TRAIN, prepare_text, tokenize

from megakd.data.selection import Selection

HERE = Path("examples/miniplm")
SEQ_LENGTH = 256
RATIO = 0.5
NO_SCORE = 1e6  # the temperature at which Gumbel noise alone decides what is kept


@dataclass(frozen=True)
class Example:
    """seed: of noise, weights and data order. steps: of a student."""

    seed: int
    steps: int
    out: Path

    @property
    def teacher_steps(self) -> int:
        return self.steps * 5 // 2

    @property
    def reference_steps(self) -> int:
        return self.steps * 5 // 4

    @property
    def shared_text(self) -> Path:
        return self.out / "text"

    @property
    def text(self) -> Path:
        """The noisy corpus of this seed."""
        return self.out / f"miniplm-seed-{self.seed}-text"

    @property
    def runs(self) -> Path:
        return self.out / f"miniplm-seed-{self.seed}-steps-{self.steps}"

    def dataset(self, part: str) -> Path:
        return self.text / f"{part}_text_document"


def main() -> None:
    begin()
    example = Example(
        seed=int(os.environ.get("MINIPLM_SEED", "1234")),
        steps=int(os.environ.get("MINIPLM_STEPS", "400")),
        out=Path(os.environ.get("MINIPLM_OUT", "demo-out")),
    )
    prepare_text(example.shared_text)
    plant(example)
    runs = example.runs

    # Teacher and references learn from one part of the noisy corpus, nothing of which is a candidate.
    train(example, "teacher", ["teacher"], "reference", example.teacher_steps)
    train(example, "reference", ["reference"], "reference", example.reference_steps)
    train(example, "reference-small", ["reference", "reference-small"], "reference", example.reference_steps)
    for name in figures.MODELS:
        score(example, name)

    # The half that MiniPLM keeps; what a smaller reference would keep; as much at random; and of what is not noise.
    scores: list[Word] = ["--teacher-scores", runs / "scores-teacher", "--reference-scores", runs / "scores-reference"]
    small: list[Word] = [*scores[:3], runs / "scores-reference-small"]
    by_chance: list[Word] = ["--gumbel-temperature", str(NO_SCORE), "--seed", example.seed]
    select(example, "refined", *scores, "--ratio", str(RATIO))
    select(example, "refined-small", *small, "--ratio", str(RATIO))
    select(example, "random", *scores, "--ratio", str(RATIO), *by_chance)
    excluded = runs / "noise-samples.npy"
    stage(excluded.exists(), "samples that are noise", partial(write_noise_samples, example, excluded))
    select(example, "noise-free", *scores, *noise_free(example, excluded), *by_chance)

    report: list[Word] = ["--selection", runs / "refined", "--data-path", example.dataset("candidates")]
    report += ["--domains", example.text / "candidates.domains"]
    report += ["--other-reference-scores", runs / "scores-reference-small", "--output", runs / "report"]
    megakd("report", (runs / "report" / "report.json").exists(), "report", *scores, *report)

    # The same student, the same number of steps, three selections.
    for name in figures.STUDENTS:
        train(example, f"student-{name}", ["student"], "candidates", example.steps, "--selection", runs / name)
    tokens = read_planted(example.dataset("candidates"), example.text / "candidates.kinds.json", SEQ_LENGTH)
    print("\n" + figures.write(runs, tokens, seed=example.seed))


def plant(example: Example) -> None:
    """The noisy corpus, a dataset for each of its parts."""
    example.text.mkdir(parents=True, exist_ok=True)
    done = (example.text / f"{noise.PARTS[-1]}.jsonl").exists()  # the last file that is written
    clean = example.shared_text / TRAIN
    stage(done, "planted noise", lambda: print(noise.write_corpus(clean, example.text, example.seed)))
    for part in noise.PARTS:
        tokenize(example.text / f"{part}.jsonl", example.text / part, example.shared_text / TOKENIZER)


def train(example: Example, name: str, configs: list[str], part: str, steps: int, *flags: Word) -> None:
    """``megakd train`` on a part of the noisy corpus, evaluated on held-out text without noise."""
    save = example.runs / name
    words: list[Word] = [word for config in configs for word in ("--config", HERE / f"{config}.yaml")]
    words += ["--data-path", example.dataset(part), *flags]
    words += ["--valid-data-path", example.shared_text / "held-out_text_document", "--save", save]
    words += ["--seed", example.seed, "--train-iters", steps, "--lr-warmup-iters", steps // 10]
    megakd_on_two_ranks(name, trained(save, steps), "train", *words)


def score(example: Example, name: str) -> None:
    """``megakd score``: every candidate under one model."""
    output = example.runs / f"scores-{name}"
    words: list[Word] = ["--load", example.runs / name, "--data-path", example.dataset("candidates")]
    words += ["--seq-length", SEQ_LENGTH, "--micro-batch-size", 16, "--output", output]
    megakd_on_two_ranks(output.name, (output / "scores.json").exists(), "score", *words)


def select(example: Example, name: str, *flags: Word) -> None:
    """``megakd select``, whose correlations warn of a score that is little more than one model's own."""
    done = (example.runs / name / "selection.json").exists()
    megakd(f"selection: {name}", done, "select", *flags, "--output", example.runs / name)


def write_noise_samples(example: Example, path: Path) -> None:
    """The ids of the candidates that are noise, for ``--exclude-ids``."""
    tokens = read_planted(example.dataset("candidates"), example.text / "candidates.kinds.json", SEQ_LENGTH)
    ids = np.flatnonzero(sample_kinds(tokens) != noise.KINDS.index(noise.CLEAN))
    np.save(path, ids.astype(np.int64))
    print(f"{path}: {len(ids)} of {len(tokens)} samples")


def noise_free(example: Example, excluded: Path) -> list[Word]:
    """Flags that leave the noise out and keep as many samples as the other selections."""
    refined = Selection(example.runs / "refined")
    left = refined.num_samples - len(np.load(excluded))
    kept = min(len(refined), left)
    return ["--exclude-ids", excluded, "--ratio", f"{min(1.0, (kept + 0.5) / left):.6f}"]


if __name__ == "__main__":
    main()
