"""The demo: one student trained six ways on the same number of tokens of real text. ``main`` is the whole of it.

Environment: DEMO_SEED (1234), DEMO_STEPS (120, a student's; the teacher gets 5/4 and MiniPLM's reference 5/8 of them),
DEMO_OUT (demo-out). A stage whose result is there is skipped, so that a second call continues where the first one
stopped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import report
from stages import Stage, Word, begin, megakd, megakd_on_two_ranks, megakd_two_at_once, trained
from text import FOR_STUDENTS, FOR_TEACHER, HELD_OUT, prepare_parts, prepare_text

HERE = Path("examples/demo")
SEQ_LENGTH = 256
RATIO = 0.5  # of the samples, what MiniPLM keeps
DRAWS = 50
# fp32, where another layout differs by the order of additions alone; in bf16 rounding noise grows within 20 steps.
LAYOUTS = {
    "tensor-fp32": ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"],
    "pipeline-fp32": ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"],
}
LAYOUT_STEPS = 20
LAYOUT_TOLERANCE = 1e-4  # nats, of losses near 8: about 1e-5 relative
# 46 batches of 16 samples of 256 tokens are nearly the whole split, each sample once.
WHOLE_SPLIT: list[Word] = ["--eval-iters", 46]


@dataclass(frozen=True)
class Demo:
    """seed: of weights, data order and draws, for all models. steps: of a student."""

    seed: int
    steps: int
    out: Path

    @property
    def teacher_steps(self) -> int:
        return self.steps * 5 // 4

    @property
    def reference_steps(self) -> int:
        return self.steps * 5 // 8

    @property
    def text(self) -> Path:
        return self.out / "text"

    @property
    def runs(self) -> Path:
        return self.out / f"seed-{self.seed}-steps-{self.steps}"

    def dataset(self, file: str) -> Path:
        return self.text / f"{Path(file).stem}_text_document"


def main() -> None:
    begin()
    demo = Demo(
        seed=int(os.environ.get("DEMO_SEED", "1234")),
        steps=int(os.environ.get("DEMO_STEPS", "120")),
        out=Path(os.environ.get("DEMO_OUT", "demo-out")),
    )
    runs, steps = demo.runs, demo.steps
    prepare_text(demo.text)
    prepare_parts(demo.text)

    # Teacher and students learn from parts of their own, so that they never share a sample.
    schedule: list[Word] = ["--lr-warmup-iters", steps // 10, "--lr-wsd-decay-iters", steps // 2]
    train(demo, "teacher", FOR_TEACHER, demo.teacher_steps, *schedule, *held_out(demo), *WHOLE_SPLIT)
    train(demo, "reference", FOR_TEACHER, demo.reference_steps, "--lr-warmup-iters", steps // 20)

    # What it says about the students' part, once: its best ids with MiniPLM's scores, and draws.
    scores = runs / "scores-teacher", runs / "scores-reference"
    draws: list[Word] = ["--draws", DRAWS, "--seed", demo.seed]
    read(demo, "capture", "teacher", "store-top-k", "--kind", "top_p_k", "--scores-output", scores[0])
    read(demo, "capture", "teacher", "store-sampled", "--kind", "samples", *draws)
    read(demo, "score", "reference", scores[1].name)
    refined, rule = runs / "refined", ["--ratio", str(RATIO)]
    models: list[Word] = ["--teacher-scores", scores[0], "--reference-scores", scores[1]]
    megakd("refined", (refined / "selection.json").exists(), "select", *models, *rule, "--output", refined)

    schedule = ["--lr-warmup-iters", steps // 20, *held_out(demo)]
    megakd_two_at_once(
        [
            training(demo, name, FOR_STUDENTS, steps, *schedule, *flags, config="student")
            for name, flags in students(demo).items()
        ]
    )
    check_layouts(demo)
    megakd_two_at_once([evaluation(demo, name) for name in students(demo)])
    print("\n" + report.write(runs, seed=demo.seed))


def students(demo: Demo) -> dict[str, list[Word]]:
    """What each student is given beside text, in the order of the table."""
    runs = demo.runs
    top_k: list[Word] = ["--logits-load-dir", runs / "store-top-k", "--kd-tail", "renormalise"]
    refined: list[Word] = ["--selection", runs / "refined"]
    return {
        "plain": [],
        "online": ["--teacher-load", runs / "teacher"],
        "top-k": top_k,
        "sampled": ["--logits-load-dir", runs / "store-sampled"],
        "miniplm": refined,
        "miniplm-top-k": [*refined, *top_k],
    }


def check_layouts(demo: Demo) -> None:
    """Distil over two halves of every layer, and over two pipeline stages: the losses must be the same."""
    small: list[Word] = ["--bf16", "false", "--global-batch-size", 8, "--micro-batch-size", 4]
    small += ["--lr-warmup-iters", LAYOUT_STEPS // 2]  # Adam's first steps magnify the rounding of small gradients
    for name, layout in LAYOUTS.items():
        flags = [*small, "--teacher-load", demo.runs / "teacher", *layout]
        train(demo, name, FOR_STUDENTS, LAYOUT_STEPS, *flags, config="student")
    difference = report.largest_difference(*(demo.runs / name for name in LAYOUTS))
    print(f"\nTP 2 against PP 2: {LAYOUT_STEPS} steps in fp32, largest difference of a loss {difference:.1e} nats")
    if difference > LAYOUT_TOLERANCE:
        sys.exit(f"error: that is more than {LAYOUT_TOLERANCE:.0e}: the two layouts do not train the same model")


def held_out(demo: Demo) -> list[Word]:
    return ["--valid-data-path", demo.dataset(HELD_OUT)]


def train(demo: Demo, name: str, text: str, steps: int, *flags: Word, config: str | None = None) -> None:
    """Run one training on two ranks."""
    stage = training(demo, name, text, steps, *flags, config=config)
    megakd_on_two_ranks(stage.name, stage.done, *stage.words)


def training(demo: Demo, name: str, text: str, steps: int, *flags: Word, config: str | None = None) -> Stage:
    """One training run, done if its last checkpoint is there. config: name of its file, by default the run's."""
    words = train_words(demo, name, text, "--train-iters", steps, *flags, config=config or name)
    return Stage(name, trained(demo.runs / name, steps), words)


def evaluation(demo: Demo, student: str) -> Stage:
    """A student on the whole held-out split, beside the teacher; its weights alone, whatever it was trained on."""
    name, runs = f"{student}-held-out", demo.runs
    weights: list[Word] = ["--skip-train", "--finetune", "--load", runs / student]
    beside: list[Word] = ["--teacher-load", runs / "teacher", *WHOLE_SPLIT, *held_out(demo)]
    words = train_words(demo, name, FOR_STUDENTS, *weights, *beside, config="student")
    return Stage(name, report.is_evaluated(runs / name), words)


def train_words(demo: Demo, name: str, text: str, *flags: Word, config: str) -> tuple[Word, ...]:
    """``train`` and the flags that every run has."""
    files: list[Word] = ["--config", HERE / f"{config}.yaml", "--data-path", demo.dataset(text)]
    return ("train", *files, "--save", demo.runs / name, "--seed", demo.seed, *flags)


def read(demo: Demo, verb: str, model: str, name: str, *flags: Word) -> None:
    """``megakd capture`` or ``score`` of the students' text on two ranks."""
    output = demo.runs / name
    done = any((output / manifest).exists() for manifest in ("store.json", "scores.json"))
    own: list[Word] = ["--load", demo.runs / model, "--data-path", demo.dataset(FOR_STUDENTS)]
    own += ["--seq-length", SEQ_LENGTH, "--micro-batch-size", 16, "--output", output]
    megakd_on_two_ranks(name, done, verb, *own, *flags)


if __name__ == "__main__":
    main()
