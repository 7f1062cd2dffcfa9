"""A corpus with scores for tests of selecting: many ties, one or more datasets, and the twin's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pipeline.select.select_twin import gumbel, ordered, scores_of, take, write

from megakd.config.tree import parse
from megakd.data.selection import MANIFEST, Selection
from megakd.pipeline.select.config import SelectConfig
from megakd.pipeline.select.preflight import open_scored
from megakd.pipeline.select.run import select


def configure(*argv: Any) -> SelectConfig:
    return parse(SelectConfig, [str(word) for word in argv], prog="megakd select", description="")


def run(*argv: Any) -> list[list[int]]:
    """The ids of every output, selected afresh."""
    config = configure(*argv)
    sources = open_scored(config)
    for output in config.output:
        Path(output, MANIFEST).unlink(missing_ok=True)
    outcome = select(config, sources)
    assert [m.parameters["num_kept"] for m in outcome.manifests] == [len(Selection(o)) for o in config.output]
    return [Selection(output).ids.tolist() for output in config.output]


class Corpus:
    """Scores of a teacher and a reference over samples of one or more datasets, and the twin's answer."""

    def __init__(self, folder: Path, sizes: list[int], seed: int, *, levels: int = 5, uniform: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.folder, self.names = folder, [f"d{i}" for i in range(len(sizes))]
        self.counts, self.teacher, self.reference = [], [], []
        for name, size in zip(self.names, sizes):
            counts = np.full(size, 4) if uniform else rng.integers(0, 8, size)
            # few levels of NLL a token make many ties of the difference
            teacher, reference = (-rng.integers(1, levels + 1, size) * 0.37 * counts for _ in range(2))
            for kind, values in (("t", teacher), ("r", reference)):
                write(folder / f"{kind}-{name}", values, counts, dataset=name, model=kind)
            self.counts.append(counts)
            self.teacher.append(teacher.astype(np.float32))
            self.reference.append(reference.astype(np.float32))

    def flags(self, order: list[int] | None = None) -> list[Any]:
        names = [self.names[i] for i in order or range(len(self.names))]
        return [
            "--teacher-scores", *(self.folder / f"t-{name}" for name in names),
            "--reference-scores", *(self.folder / f"r-{name}" for name in reversed(names)),
            "--output", *(self.folder / f"out-{name}" for name in names),
        ]  # fmt: skip

    def scores(self, scale: float = 1.0, per: str = "token") -> list[Any]:
        return [
            scores_of([(1.0, r), (-scale, t)], c if per == "token" else np.ones(len(c)))
            for r, t, c in zip(self.reference, self.teacher, self.counts)
        ]

    def twin(
        self,
        ratio: float = 0.5,
        *,
        scale: float = 1.0,
        per: str = "token",
        by_tokens: bool = False,
        seed: int = 1234,
        excluded: set[int] = frozenset(),
        drop_negative: bool = False,
        drop_top: float = 0.0,
        temperature: float = 0.0,
        groups: list[list[int]] | None = None,
    ) -> list[list[int]]:
        """The ids kept of every dataset; groups of datasets are selected from one by one."""
        kept: list[list[int]] = [[] for _ in self.names]
        scores = self.scores(scale, per)
        places = [(d, i) for d, c in enumerate(self.counts) for i in range(len(c)) if c[i] > 0 and i not in excluded]
        order = ordered(
            [scores[d][i] for d, i in places], [i for _, i in places], [self.names[d] for d, _ in places], seed
        )
        dropped = set(order[: int(drop_top * len(places))])
        for group in groups or [list(range(len(self.names)))]:
            own = [at for at in range(len(places)) if places[at][0] in group]
            budget = int(ratio * sum(int(self.counts[places[at][0]][places[at][1]]) if by_tokens else 1 for at in own))
            own = [at for at in own if at not in dropped]
            own = [at for at in own if not (drop_negative and scores[places[at][0]][places[at][1]] < 0)]
            values = [scores[places[at][0]][places[at][1]] for at in own]
            if temperature:
                noise = [gumbel([places[at][1]], seed, self.names[places[at][0]])[0] for at in own]
                values = [np.float32(float(v) / temperature + g) for v, g in zip(values, noise)]
            order = ordered(values, [places[at][1] for at in own], [self.names[places[at][0]] for at in own], seed)
            amounts = [int(self.counts[places[at][0]][places[at][1]]) if by_tokens else 1 for at in own]
            for at in take(order, amounts, budget):
                dataset, sample = places[own[at]]
                kept[dataset].append(sample)
        return [sorted(ids) for ids in kept]
