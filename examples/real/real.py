"""A real teacher: SmolLM2-135M, as a Hugging Face folder, teaches students of its tokenizer. ``main`` is all of it.

Environment: REAL_SEED (1234), REAL_STEPS (200, a student's; the reference gets a quarter of them), REAL_OUT
(real-out), REAL_ITEMS (200, of each task). A stage whose result is there is skipped: a second call continues. The
teacher's pass over the text is shared by all seeds and numbers of steps.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))  # how stages run

import figures
import tasks
import teacher
from parts import HELD_OUT, REFERENCE, STUDENTS, prepare_text
from stages import Stage, Word, begin, megakd, megakd_two_at_once, stage, trained

HERE = Path("examples/real")
SEQ_LENGTH = 256
DRAWS = 50
KD_ALPHA = "0.7"
RATIO = "0.5"  # of the samples, what MiniPLM keeps


@dataclass(frozen=True)
class Example:
    """seed: of weights and data order. steps: of a student. items: of each task."""

    seed: int
    steps: int
    items: int
    out: Path

    @property
    def runs(self) -> Path:
        return self.out / f"seed-{self.seed}-steps-{self.steps}"

    @property
    def teacher(self) -> Path:
        return self.out / "SmolLM2-135M-Instruct"

    def dataset(self, part: str) -> Path:
        return self.out / "text" / f"{part}_text_document"


def main() -> None:
    begin()
    example = Example(
        seed=int(os.environ.get("REAL_SEED", "1234")),
        steps=int(os.environ.get("REAL_STEPS", "200")),
        items=int(os.environ.get("REAL_ITEMS", "200")),
        out=Path(os.environ.get("REAL_OUT", "real-out")),
    )
    out, runs = example.out, example.runs
    stage(example.teacher.exists(), "teacher", lambda: print(teacher.write_teacher(example.teacher, out / "packages")))
    prepare_text(out / "text", out / "packages", example.teacher)
    stage((out / "tasks").exists(), "tasks", lambda: print(tasks.write_tasks(out / "tasks", out / "packages")))

    # The teacher's one pass: draws from its distribution, and MiniPLM's scores. It takes longest, and is done once.
    draws, scores = out / "draws", out / "scores-teacher"
    flags: list[Word] = ["--load", example.teacher, *samples(example), "--kind", "samples", "--draws", DRAWS]
    flags += ["--seed", 1234, "--bf16", "true", "--scores-output", scores, "--output", draws]
    megakd("draws", (draws / "store.json").exists(), "capture", *flags)

    half = ["--ratio", RATIO, "--output", runs / "refined"]
    steps: list[Word] = ["--train-iters", example.steps // 4, "--lr-warmup-iters", example.steps // 40]
    reference = training(example, "reference", REFERENCE, *steps)
    megakd("reference", reference.done, *reference.words)
    known = runs / "scores-reference"
    flags = ["--load", runs / "reference", *samples(example), "--output", known]
    megakd("scores of the reference", (known / "scores.json").exists(), "score", *flags)
    models: list[Word] = ["--teacher-scores", scores, "--reference-scores", known]
    megakd("selection", (runs / "refined" / "selection.json").exists(), "select", *models, *half)

    steps = ["--train-iters", example.steps, "--lr-warmup-iters", example.steps // 20]
    steps += ["--valid-data-path", example.dataset(HELD_OUT)]
    sources: dict[str, list[Word]] = {
        "plain": [],
        "draws": ["--logits-load-dir", draws, "--kd-alpha", KD_ALPHA],
        "miniplm": ["--selection", runs / "refined"],
    }
    megakd_two_at_once(
        [training(example, name, STUDENTS, *steps, *source, config="student") for name, source in sources.items()]
    )
    megakd_two_at_once([evaluation(example, name) for name in ("teacher", *sources)])
    print("\n" + figures.write(runs, list(sources), seed=example.seed))


def samples(example: Example) -> list[Word]:
    """Samples of the students' text, as a frozen model reads them."""
    return ["--data-path", example.dataset(STUDENTS), "--seq-length", SEQ_LENGTH, "--micro-batch-size", 16]


def training(example: Example, name: str, part: str, *flags: Word, config: str | None = None) -> Stage:
    """A training run, done if its last checkpoint is there. config: name of its file, by default the run's."""
    save = example.runs / name
    files: list[Word] = ["--config", HERE / f"{config or name}.yaml", "--data-path", example.dataset(part)]
    steps = int(flags[list(flags).index("--train-iters") + 1])
    return Stage(name, trained(save, steps), ("train", *files, "--save", save, "--seed", example.seed, *flags))


def evaluation(example: Example, name: str) -> Stage:
    """A model on the held-out text, beside the teacher, and on the tasks. The teacher's is shared by all runs."""
    load = example.teacher if name == "teacher" else example.runs / name
    output = example.out / "teacher-evaluated" if name == "teacher" else example.runs / f"{name}-evaluated"
    flags: list[Word] = ["--load", load, "--data-path", example.dataset(HELD_OUT), "--seq-length", SEQ_LENGTH]
    flags += ["--requests", *sorted((example.out / "tasks").glob("*.jsonl.gz")), "--limit", example.items]
    flags += ["--output", output] + ([] if name == "teacher" else ["--teacher-load", example.teacher])
    return Stage(f"{name}, evaluated", figures.is_evaluated(output), ("evaluate", *flags))


if __name__ == "__main__":
    main()
