"""The design space of pre-training distillation at the demo's scale: many students from one capture, one table.

A stage whose result is there is skipped: a second call continues, and other tables add to those that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))  # the corpus, and how stages run

import findings
import numpy as np
from settings import FIRST, LM, TABLES, Setting
from stages import Word, begin, megakd_on_two_ranks, stage, trained
from text import prepare_text
from truncate import truncate_store

from megakd.__main__ import run
from megakd.config.tree import option, parse
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.data.selection import SelectionWriter
from megakd.errors import UsageError

HERE = Path("examples/pretraining_distillation")
SEQ_LENGTH, BATCH = 256, 8  # as in student.yaml
WIDEST = max(cut[1] for table in TABLES.values() for setting in table if (cut := setting.cut))


@dataclass(frozen=True)
class Sweep:
    only: list[str] = option([], f"tables to make: {', '.join(TABLES)} (default: all)", common=True)
    steps: int = option(400, "of a student, 2,048 tokens each", common=True)
    seed: int = option(1234, "of weights and the order of the data", common=True)
    seeds: int = option(
        3, "from --seed on, of LM alone and of the first configuration: these tell the noise", common=True
    )
    eval_iters: int = option(100, "batches of held-out text a student is evaluated on; 100 are all of it")
    teacher: Path | None = option(
        None,
        "a trained teacher with the demo's tokenizer (default: train one, of the demo's shape, in OUTPUT)",
        common=True,
    )
    output: Path = option(Path("demo-out"), "folder; its text is shared with the demo", common=True)

    def validate(self) -> None:
        if unknown := set(self.only) - set(TABLES):
            raise UsageError(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(TABLES)}")
        if self.steps < 20 or self.seeds < 1:
            raise UsageError(f"--steps {self.steps}, --seeds {self.seeds}: expected at least 20 and 1")

    @property
    def runs(self) -> Path:
        return self.output / f"pd-sweep-steps-{self.steps}"

    @property
    def teacher_run(self) -> Path:
        return self.teacher or self.output / "pd-sweep-teacher"

    @property
    def dataset(self) -> Path:
        return self.output / "text" / "train_text_document"

    @property
    def samples(self) -> Path:
        """The selection of those that students see, once each."""
        return self.runs / "samples"

    def student(self, setting: Setting, seed: int) -> Path:
        return self.runs / f"{setting.name}-seed-{seed}"

    def store(self, cut: tuple[float, int]) -> Path:
        return self.runs / f"store-{cut[0]:g}-{cut[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run or continue the sweep; returns its exit status."""
    sweep = parse(
        Sweep,
        argv,
        prog="sweep.py",
        description="Pre-training distillation's design-space tables (arXiv 2410.16215) at the demo's scale: the "
        "teacher is asked once, every student reads a cut of what it said.",
    )
    begin()
    prepare_text(sweep.output / "text")
    if sweep.teacher is None:
        train_teacher(sweep)
    stage((sweep.samples / "selection.json").exists(), "samples", partial(select, sweep))
    capture(sweep)

    # The noise first: then every table says at once which of its differences are more than that.
    for setting in (LM, FIRST):
        for seed in range(sweep.seed, sweep.seed + sweep.seeds):
            train(sweep, setting, seed)
    tables = {name: table for name, table in TABLES.items() if name in (sweep.only or TABLES)}
    for table in tables.values():
        for setting in table:
            train(sweep, setting, sweep.seed)
        report(sweep)
    return 0


def report(sweep: Sweep) -> None:
    """All that is trained so far, of whatever call."""
    done = {
        name: [setting for setting in table if trained(sweep.student(setting, sweep.seed), sweep.steps)]
        for name, table in TABLES.items()
    }
    made = {name: settings for name, settings in done.items() if settings}
    print("\n" + findings.write(sweep.runs, made, seed=sweep.seed, seeds=sweep.seeds), flush=True)


def train_teacher(sweep: Sweep) -> None:
    """The demo's, on more text and for longer."""
    words: list[Word] = ["--config", HERE.parent / "demo" / "teacher.yaml", "--data-path", sweep.dataset]
    words += ["--valid-data-path", sweep.output / "text" / "held-out_text_document", "--save", sweep.teacher_run]
    words += ["--train-iters", 500, "--lr-warmup-iters", 40, "--lr-wsd-decay-iters", 200]
    megakd_on_two_ranks("teacher", trained(sweep.teacher_run, 500), "train", *words)


def select(sweep: Sweep) -> None:
    """As many samples as a student sees, spread evenly over the corpus."""
    dataset = IndexedDataset(sweep.dataset)
    samples = ConcatSamples(dataset, SEQ_LENGTH)
    number = min(sweep.steps * BATCH, samples.num_samples)
    ids = np.linspace(0, samples.num_samples, number, endpoint=False).astype(np.int64)
    with SelectionWriter(sweep.samples) as writer:
        writer.append(ids)
        writer.finish(
            packing=samples.packing,
            seq_length=SEQ_LENGTH,
            num_samples=samples.num_samples,
            dataset=dataset.fingerprint,
            rule={"evenly": number},
        )
    print(f"{sweep.samples}: {number} of {samples.num_samples} samples")


def capture(sweep: Sweep) -> None:
    """``megakd capture``: the widest rows that any setting reads."""
    output = sweep.store((1.0, WIDEST))
    words: list[Word] = ["--load", sweep.teacher_run, "--data-path", sweep.dataset, "--selection", sweep.samples]
    words += ["--seq-length", SEQ_LENGTH, "--micro-batch-size", 8, "--top-p", "1.0", "--top-k", WIDEST]
    words += ["--value-bits", "16", "--output", output]
    megakd_on_two_ranks(output.name, (output / "store.json").exists(), "capture", *words)


def cut_store(sweep: Sweep, cut: tuple[float, int]) -> None:
    """The store that a setting reads, from the widest."""
    samples = ConcatSamples(IndexedDataset(sweep.dataset), SEQ_LENGTH)
    truncate_store(sweep.store((1.0, WIDEST)), sweep.store(cut), samples, top_p=cut[0], top_k=cut[1])


def train(sweep: Sweep, setting: Setting, seed: int) -> None:
    """``megakd train``: one student."""
    save, steps = sweep.student(setting, seed), sweep.steps
    done = trained(save, steps)
    words: list[Word] = ["--config", HERE / "student.yaml", "--data-path", sweep.dataset, "--selection", sweep.samples]
    words += ["--valid-data-path", sweep.output / "text" / "held-out_text_document", "--save", save]
    words += ["--seed", seed, "--train-iters", steps, "--eval-iters", sweep.eval_iters]
    words += ["--lr-warmup-iters", steps // 20, "--lr-wsd-decay-iters", steps // 5]
    if setting.cut is not None:
        store = sweep.store(setting.cut)
        stage(done or (store / "store.json").exists(), store.name, partial(cut_store, sweep, setting.cut))
        words += ["--logits-load-dir", store]
    if setting.dense:
        words += ["--teacher-load", sweep.teacher_run, "--kd-tail", "none"]
    megakd_on_two_ranks(f"{setting.title}, seed {seed}", done, "train", *words, *setting.flags.split())


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
