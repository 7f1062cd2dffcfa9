"""``megakd compare``: runs side by side, from their records: did the teacher, or the selection, help?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson

from megakd.artefacts.durable_files import atomic_write
from megakd.config.tree import parse
from megakd.errors import ExitStatus
from megakd.pipeline.compare import config as compare_config
from megakd.pipeline.compare.config import CompareConfig
from megakd.pipeline.compare.groups import find_group, make_groups
from megakd.pipeline.compare.plot import draw
from megakd.pipeline.compare.table import Comparison, as_csv, as_dict, compare, markdown
from megakd.run_folder.costs import Known, count_costs, teacher_folders
from megakd.run_folder.figures import measure, parse_run_name
from megakd.run_folder.record import read_run

HELP = compare_config.HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb."""
    config = parse(
        CompareConfig,
        argv,
        prog="megakd compare",
        description=compare_config.DESCRIPTION,
        epilog=compare_config.EPILOG,
    )
    comparison = compare_runs(config)
    if config.json:
        print(orjson.dumps(as_dict(comparison), option=orjson.OPT_INDENT_2).decode())
    else:
        print(markdown(comparison))
    if config.csv is not None:
        _write(Path(config.csv), as_csv(comparison).encode())
    if config.plot is not None:
        _write(Path(config.plot), draw(comparison, suffix=Path(config.plot).suffix))
    return ExitStatus.COMPLETE


def compare_runs(config: CompareConfig) -> Comparison:
    """Read every run and hold it against the baseline.

    Raises UsageError for a folder without a run, CorruptError for a damaged record, MismatchError for an evaluation of
    another run than the one that it is named with.
    """
    named = [parse_run_name(text) for text in config.run]
    names = list({(name.label, name.folder.resolve(), name.evaluation): name for name in named}.values())  # once
    records = [read_run(name.folder, flag="") for name in names]
    known = Known()
    known.add_models([*map(Path, config.models), *teacher_folders(records), *(name.folder for name in names)])
    known.add_scores(map(Path, config.scores))
    runs = [measure(name, record, count_costs(record, known)) for name, record in zip(names, records)]
    groups = make_groups(runs)
    base = groups[0] if config.baseline is None else find_group(groups, config.baseline)
    return compare(groups, base, target_loss=config.target_loss)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
