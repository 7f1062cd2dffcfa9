"""The rules of the house, read from the source: layers, lengths, names."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("megakd", "tools") for path in (ROOT / folder).rglob("*.py"))

# From the ground up. A module imports from lower rows or from its own entry, never upwards, never from a neighbour.
LAYERS = (
    ("errors", "targets", "splitmix64", "known_warnings", "_csrc", ""),  # "" is megakd/__init__.py
    ("config", "artefacts"),
    ("layout", "work"),
    ("data", "logits", "losses"),
    ("cpu", "parallel"),
    ("model",),
    ("teachers", "run_folder"),
    ("train", "pipeline"),
    ("__main__",),
    ("tools",),
)
# The rooms of the pipeline, each a verb or what verbs share: these import one another, and no others do.
PIPELINE_ARROWS = {
    ("score", "frozen"),
    ("capture", "frozen"),
    ("capture", "score"),
    ("proxy", "frozen"),
    ("evaluate", "frozen"),
    ("prune", "frozen"),
    ("report", "select"),
}
# Every other room of the pipeline is one verb's, and its door is main.py.
ROOMS_WITHOUT_A_DOOR = {"frozen", "datasets"}  # below three verbs; merge, pack, show and verify, a file each
# Where attributes of megatron-core are assigned to: nothing else may change it.
PATCHES_MEGATRON = {"megakd/cpu.py", "megakd/train/fused_adam.py", "megakd/model/checkpoint/save.py"}
# Rooms without tests of their own, and the tests that cover them.
TESTED_ELSEWHERE = {
    "data/scores": "tests/pipeline/select and tests/pipeline/score",
    "losses/kernels/gpu": "tests/losses/kernels",
    "model/proxy": "tests/pipeline/proxy",
    "run_folder": "tests/pipeline/compare",
}
READS_THE_ENVIRONMENT = {
    "megakd/__main__.py",  # no import from the current folder, in this process and its children
    "megakd/layout.py",  # how many ranks torchrun started
    "megakd/parallel.py",  # where they meet
    "megakd/work/worker_pool.py",  # what its processes inherit
    "megakd/data/tokenizers/huggingface.py",  # threads of the tokenizers package
    "megakd/pipeline/preprocess/main.py",
    "megakd/pipeline/tokenizer/training.py",
    "megakd/data/tokenizers/scan_cache.py",  # the user's cache folder
    "megakd/losses/kernels/gpu/launch.py",  # Triton's interpreter
    "megakd/train/record/trackers.py",  # what W&B and MLflow are told
}
NEIGHBOURS = {("parallel", "cpu")}  # what starts the process groups must first make megatron run here
SEAM = ("model", "teachers", "parallel", "cpu", "train")  # the only entries that may import megatron
LOCAL_IMPORTS_ALLOWED = {
    ("megakd/__main__.py", "megakd"),  # the version, for --version alone
    # --help and refusals must not wait for what does the work
    ("megakd/pipeline/preprocess/main.py", "megakd.pipeline.preprocess.run"),
    ("megakd/train/main.py", "megakd.train.loop"),
    ("megakd/pipeline/score/main.py", "megakd.pipeline.score.run"),
    ("megakd/pipeline/capture/main.py", "megakd.pipeline.capture.run"),
    ("megakd/pipeline/proxy/main.py", "megakd.pipeline.proxy.fit"),
    ("megakd/pipeline/prune/main.py", "megakd.pipeline.prune.run"),
    ("megakd/pipeline/generate/main.py", "megakd.pipeline.generate.run"),
    ("megakd/pipeline/evaluate/main.py", "megakd.pipeline.evaluate.run"),
    ("megakd/pipeline/evaluate/run.py", "megakd.pipeline.evaluate.task_figures"),  # lm-eval is optional, and slow
    ("megakd/pipeline/convert/main.py", "megakd.pipeline.convert.run"),
    # triton need not be installed where nobody runs its kernels
    ("megakd/losses/kernels/gpu/launch.py", "megakd.losses.kernels.gpu.head_search"),
    ("megakd/losses/kernels/gpu/launch.py", "megakd.losses.kernels.gpu.statistics"),
    ("megakd/losses/kernels/gpu/launch.py", "megakd.losses.kernels.gpu.gradients"),
    ("megakd/train/preflight.py", "megakd.model.checkpoint.tensor_names"),  # only where there is a checkpoint to read
}
# Wrong input is refused by these before torch or megatron is loaded, so nothing that they load may load either.
TORCH_FREE = (
    "megakd.__main__",
    "megakd.layout",
    "megakd.model.config",
    "megakd.model.checkpoint.record",
    "megakd.train.config",
    "megakd.train.main",
    "megakd.train.preflight",
)
# What the others load once nothing is left to refuse.
RUNS_A_MODEL = tuple(
    f"megakd.pipeline.{name}"
    for name in (
        "frozen.model",
        "frozen.run",
        "score.run",
        "score.columns",
        "proxy.fit",
        "capture.run",
        "generate.run",
        "evaluate.run",
        "evaluate.models",
        "evaluate.likelihood",
        "evaluate.held_out",
        "evaluate.harness",
        "evaluate.task_figures",
        "evaluate.results",
        "convert.run",
        *("prune.run", "prune.calibration", "prune.observer", "prune.slices", "prune.transfer"),
    )
)
HEAVY = {"torch", "megatron", "transformer_engine", "matplotlib", "tensorboard", "lm_eval", "datasets"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted; for `from a import b`, both `a` and, if it is a module of ours, `a.b`
    line: int
    local: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING`


@functools.cache
def imports_of(path: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, local: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, local, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [name for name in names if name in MODULES]
            modules = ours if len(ours) == len(names) else [node.module, *ours]
            found.extend(Import(module, node.lineno, local, typing_only) for module in modules)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return  # what stands there is a program, above every layer
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, checking)

    visit(ast.parse(path.read_text(), str(path)), False, False)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def entry_of(module: str) -> str:
    """The row entry of a module: ``megakd.data.loader`` -> ``data``."""
    parts = module.split(".")
    if parts[0] == "tools":
        return "tools"
    return parts[1] if len(parts) > 1 else ""


def row_of(entry: str) -> int:
    rows = [index for index, row in enumerate(LAYERS) if entry in row]
    assert rows, f"'{entry}' stands in no layer; say in tests/test_house.py where it belongs"
    return rows[0]


def first_party() -> Iterator[tuple[str, Import]]:
    for name, path in MODULES.items():
        for found in imports_of(path):
            if found.module.split(".")[0] in ("megakd", "tools"):
                yield name, found


def breaches_layers(importer: str, imported: str) -> bool:
    """Whether one module of ours may not import another: it stands higher, or beside it."""
    source, target = entry_of(importer), entry_of(imported)
    if source == target or target == "" or (source, target) in NEIGHBOURS:
        return False
    return row_of(target) >= row_of(source)


def test_layers() -> None:
    wrong = [f"{name}:{at.line} imports {at.module}" for name, at in first_party() if breaches_layers(name, at.module)]
    assert not wrong, "upwards or sideways:\n" + "\n".join(wrong)


def test_layers_notice_a_breach() -> None:
    assert breaches_layers("megakd.data.loader", "megakd.losses.head")
    assert breaches_layers("megakd.losses.head", "megakd.parallel")
    assert breaches_layers("megakd.train.loop", "megakd.pipeline.datasets.merge")
    assert breaches_layers("megakd.artefacts.manifest", "megakd.data.indexed.idx_format")
    assert not breaches_layers("megakd.train.loop", "megakd.data.loader")
    assert not breaches_layers("megakd.data.loader", "megakd.data.blend")
    with pytest.raises(AssertionError, match="no layer"):
        row_of("utils")


def room_of(module: str) -> str | None:
    """The room of the pipeline that a module is in: ``megakd.pipeline.score.run`` -> ``score``."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["megakd", "pipeline"] and len(parts) > 3 else None


def test_rooms_of_the_pipeline_stand_by_themselves() -> None:
    arrows = {}
    for name, at in first_party():
        source, target = room_of(name), room_of(at.module)
        if source and target and source != target:
            arrows[source, target] = f"{name}:{at.line} imports {at.module}"
    wrong = [said for arrow, said in arrows.items() if arrow not in PIPELINE_ARROWS]
    assert not wrong, "from room to room:\n" + "\n".join(wrong)
    assert not PIPELINE_ARROWS - arrows.keys(), "arrows that nothing goes along any more"


def test_every_file_of_the_pipeline_is_in_a_room() -> None:
    loose = [path.name for path in (ROOT / "megakd" / "pipeline").glob("*.py") if path.name != "__init__.py"]
    assert not loose


def names_at_the_top(path: Path) -> set[str]:
    """What a file defines at its top level, by name."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_every_verb_has_a_door() -> None:
    from megakd.__main__ import VERBS

    for verb, module in VERBS.items():
        assert {"HELP", "main"} <= names_at_the_top(MODULES[module]), f"{verb}: {module} lacks HELP or main"
    rooms = {path.parent.name for path in (ROOT / "megakd" / "pipeline").glob("*/__init__.py")}
    doors = {path.parent.name for path in (ROOT / "megakd" / "pipeline").glob("*/main.py")}
    assert rooms - doors == ROOMS_WITHOUT_A_DOOR
    assert {f"megakd.pipeline.{room}.main" for room in doors} <= set(VERBS.values())


def assigns_to_megatron(path: Path) -> list[int]:
    """Lines that assign to an attribute of something of megatron's, or call ``setattr`` in a file that imports it."""
    text = path.read_text()
    tree = ast.parse(text)
    theirs: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            theirs |= {alias.asname or alias.name.split(".")[0] for alias in node.names if "megatron" in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            theirs |= {alias.asname or alias.name for alias in node.names}

    def is_theirs(node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in theirs

    lines = []
    for node in ast.walk(tree):  # breadth first: a name is given before what lies deeper assigns to its attributes
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(names)
            for name, value in zip(names, values):
                if isinstance(name, ast.Name) and is_theirs(value):
                    theirs.add(name.id)
                if isinstance(name, ast.Attribute) and is_theirs(name):
                    lines.append(node.lineno)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "setattr" and (theirs or "import_module" in text):
            lines.append(node.lineno)
    return lines


def test_megatron_is_changed_in_three_files() -> None:
    patching = {path for path in MODULES.values() if assigns_to_megatron(path)}
    wrong = {str(path.relative_to(ROOT)) for path in patching} ^ PATCHES_MEGATRON
    assert wrong <= {"megakd/parallel.py"}, wrong  # its setattr fills a collection of groups that it has just made


def test_the_environment_is_read_in_few_places() -> None:
    reading = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert reading == READS_THE_ENVIRONMENT


def test_tests_mirror_what_they_test() -> None:
    rooms = {path.parent.relative_to(ROOT / "megakd") for path in (ROOT / "megakd").rglob("__init__.py")}
    tested = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strangers = {str(room) for room in tested - rooms} - {"csrc"}
    assert not strangers, f"tests of no room of megakd/: {strangers}"
    bare = {room for room in rooms if not any(room == test or room in test.parents for test in tested)}
    assert {str(room) for room in bare} == set(TESTED_ELSEWHERE)


def test_imports_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import torch\nfrom megakd import layout\ndef f():\n    from megakd.data.loader import Loader\n"
        "if TYPE_CHECKING:\n    import numpy as np\nif __name__ == '__main__':\n    import json\n"
    )
    seen = [(at.module, at.local, at.typing_only) for at in imports_of(file)]
    assert seen == [
        ("torch", False, False),
        ("megakd.layout", False, False),
        ("megakd.data.loader", True, False),
        ("numpy", False, True),
    ]


def test_only_the_seam_imports_megatron() -> None:
    wrong = [
        f"{name}:{found.line}"
        for name, path in MODULES.items()
        for found in imports_of(path)
        if found.module.split(".")[0] in ("megatron", "transformer_engine") and entry_of(name) not in SEAM
    ]
    assert not wrong


def test_no_first_party_import_hides_in_a_function() -> None:
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name, found in first_party()
        if found.local and (str(MODULES[name].relative_to(ROOT)), found.module) not in LOCAL_IMPORTS_ALLOWED
    ]
    assert not wrong


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, found in first_party():
        if found.module in MODULES and found.module != name and not found.typing_only:
            graph[name].add(found.module)
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_what_must_start_fast_loads_nothing_heavy() -> None:
    starts = [*TORCH_FREE, *(name for name in MODULES if entry_of(name) in ("data", "pipeline"))]
    starts = [start for start in starts if start not in RUNS_A_MODEL]
    wrong = [chain for start in starts for chain in heavy_chains(start)]
    assert not wrong, "\n".join(" -> ".join(chain) for chain in wrong)


def heavy_chains(start: str) -> list[list[str]]:
    """Every way from module ``start`` to a heavy package by imports outside functions."""
    chains, seen, todo = [], {start}, [[start]]
    while todo:
        chain = todo.pop()
        for found in imports_of(MODULES[chain[-1]]):
            if found.local or found.typing_only:
                continue
            if found.module.split(".")[0] in HEAVY:
                chains.append([*chain, found.module])
            elif found.module in MODULES and found.module not in seen:
                seen.add(found.module)
                todo.append([*chain, found.module])
    return chains


def test_files_are_short() -> None:
    folders = ("megakd", "tools", "csrc", "benchmarks", "examples", "tests")
    written = [path for folder in folders for path in files(folder)]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in written}
    assert not {path: lines for path, lines in long.items() if lines >= 500}
    assert not {path: lines for path, lines in long.items() if path.startswith("tools/") and lines > 40}


def files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".sh")]


def test_every_file_says_which_idea_it_is() -> None:
    assert not [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not [path for path in MODULES.values() if path.stem in ("utils", "helpers", "common", "misc")]


def test_no_script_hides_a_standard_module() -> None:
    scripts = [path for folder in ("tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in scripts if path.stem in sys.stdlib_module_names and not path.stem.startswith("__")]


def test_help_lists_every_verb() -> None:
    from megakd.__main__ import VERBS

    shown = subprocess.run([sys.executable, "-m", "megakd", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    listed = [line.split(maxsplit=1) for line in shown.stdout.splitlines() if line.startswith("  ")]
    assert [words[0] for words in listed] == list(VERBS) and all(len(words) == 2 for words in listed)
