"""The demo: one student trained twice on the same real text, without and with a teacher. ``main`` is the whole of it.

Environment: DEMO_SEED (1234), DEMO_STEPS (400, the student's; the teacher gets 5/4 of them), DEMO_OUT (demo-out).
A stage whose result is there is skipped, so that a second call continues where the first one stopped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import report
from stages import Word, begin, megakd_on_two_ranks, trained
from text import prepare_text

HERE = Path("examples/demo")
# fp32, where another layout differs by the order of additions alone; in bf16 rounding noise grows within 20 steps.
LAYOUTS = {
    "tensor-fp32": ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"],
    "pipeline-fp32": ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"],
}
LAYOUT_STEPS = 20
LAYOUT_TOLERANCE = 1e-4  # nats, of losses near 8: about 1e-5 relative
HELD_OUT_BATCHES = 44  # of 16 samples of 256 tokens: nearly the whole split, each sample once


@dataclass(frozen=True)
class Demo:
    """seed: of weights and data order, for teacher and students. steps: of the student."""

    seed: int
    steps: int
    out: Path

    @property
    def teacher_steps(self) -> int:
        return self.steps * 5 // 4

    @property
    def text(self) -> Path:
        return self.out / "text"

    @property
    def runs(self) -> Path:
        return self.out / f"seed-{self.seed}-steps-{self.steps}"


def main() -> None:
    begin()
    demo = Demo(
        seed=int(os.environ.get("DEMO_SEED", "1234")),
        steps=int(os.environ.get("DEMO_STEPS", "400")),
        out=Path(os.environ.get("DEMO_OUT", "demo-out")),
    )
    prepare_text(demo.text)
    plain, distilled, teacher = demo.runs / "plain", demo.runs / "distilled", demo.runs / "teacher"
    with_teacher = ["--teacher-load", str(teacher)]
    schedule = ["--lr-warmup-iters", str(demo.steps // 20), "--lr-decay-iters", str(demo.steps)]
    teacher_schedule = ["--lr-warmup-iters", str(demo.steps // 10), "--lr-wsd-decay-iters", str(demo.steps // 2)]
    held_out = ["--valid-data-path", str(demo.text / "held-out_text_document")]
    train(demo, teacher, "teacher.yaml", demo.teacher_steps, *teacher_schedule, *held_out)
    train(demo, plain, "student.yaml", demo.steps, *schedule, *held_out)
    train(demo, distilled, "student.yaml", demo.steps, *schedule, *with_teacher, *held_out)

    # Distillation over two halves of every layer, and over two pipeline stages: the losses must be the same.
    for name, layout in LAYOUTS.items():
        small = ["--bf16", "false", "--global-batch-size", "8", "--micro-batch-size", "4"]
        train(demo, demo.runs / name, "student.yaml", LAYOUT_STEPS, *small, *with_teacher, *layout)
    difference = report.largest_difference(*(demo.runs / name for name in LAYOUTS))
    print(f"\nTP 2 against PP 2: {LAYOUT_STEPS} steps in fp32, largest difference of a loss {difference:.1e} nats")
    if difference > LAYOUT_TOLERANCE:
        sys.exit(f"error: that is more than {LAYOUT_TOLERANCE:.0e}: the two layouts do not train the same model")

    # Both students on the whole held-out split, beside the teacher.
    whole = [*held_out, "--skip-train", "--eval-iters", str(HELD_OUT_BATCHES)]
    for student in (plain, distilled):
        result = student.with_name(f"{student.name}-held-out")
        done = (result / "metrics.jsonl").exists() and bool(report.evaluations(result))
        launch(demo, result, "student.yaml", done, "--load", str(student), *with_teacher, *whole)
    print("\n" + report.write(demo.runs, seed=demo.seed))


def train(demo: Demo, save: Path, config: str, steps: int, *flags: str) -> None:
    """One training run, unless its last checkpoint is there."""
    launch(demo, save, config, trained(save, steps), "--train-iters", str(steps), *flags)


def launch(demo: Demo, save: Path, config: str, done: bool, *flags: str) -> None:
    """``megakd train`` on two ranks."""
    data: list[Word] = ["--data-path", demo.text / "train_text_document", "--save", save]
    own: list[Word] = ["--config", HERE / config, *data, "--seed", demo.seed]
    megakd_on_two_ranks(save.name, done, "train", *own, *flags)


if __name__ == "__main__":
    main()
