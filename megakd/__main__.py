"""``megakd VERB ...``: the list of verbs, and the import path that they start with."""

# ruff: noqa: E402
import os
import sys


def _leave_current_folder() -> None:
    """Remove the current folder, which ``python -m megakd`` and ``torchrun -m megakd`` put first, from the import path.

    Else a yaml.py in the current folder would run. Where megakd itself was found there, in a checkout that is not
    installed, the folder goes last instead: processes that are started later find megakd too, and installed packages
    come before the folder's files.
    """
    folder = sys.path.pop(0)
    if folder and os.path.realpath(folder) == os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir)):
        sys.path.append(folder)


if __name__ == "__main__" and not sys.flags.safe_path:
    _leave_current_folder()

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megakd.artefacts.durable_files import FULL
from megakd.errors import ExitStatus
from megakd.work.console import explain_unwritten, flush_output, keep_stream_numbers, print_any_name, tell

VERBS = {
    "tokenizer": "megakd.pipeline.tokenizer.main",
    "preprocess": "megakd.pipeline.preprocess.main",
    "merge": "megakd.pipeline.datasets.merge",
    "verify": "megakd.pipeline.datasets.verify",
    "show": "megakd.pipeline.datasets.show",
    "compare": "megakd.pipeline.compare.main",
    "pack": "megakd.pipeline.datasets.pack",
    "score": "megakd.pipeline.score.main",
    "proxy": "megakd.pipeline.proxy.main",
    "select": "megakd.pipeline.select.main",
    "report": "megakd.pipeline.report.main",
    "retokenize": "megakd.pipeline.retokenize.main",
    "import-miniplm": "megakd.pipeline.miniplm.main",
    "capture": "megakd.pipeline.capture.main",
    "collect": "megakd.pipeline.capture.collect_main",
    "evaluate": "megakd.pipeline.evaluate.main",
    "convert": "megakd.pipeline.convert.main",
    "plan": "megakd.pipeline.planning.main",
    "train": "megakd.train.main",
    "prune": "megakd.pipeline.prune.main",
    "generate": "megakd.pipeline.generate.main",
}


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call ``main`` and turn its exceptions into the documented exit statuses, each with one line on stderr."""
    if argv is None:
        _shield_children()
    keep_stream_numbers()
    print_any_name()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            status = int(main(argv))
    except SystemExit:  # --help
        if unwritten := flush_output():
            raise SystemExit(explain_unwritten(unwritten)) from None
        raise
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:
        flush_output()
        return ExitStatus.FAILED
    except (ValueError, OSError) as error:
        status_of_error = getattr(error, "status", None)
        if status_of_error is None and not isinstance(error, OSError):
            raise  # not foreseen: the traceback is the message
        unwritten = flush_output()
        if status_of_error is None and isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            unwritten = error  # standard output without a buffer: errors of files carry their names
        if status_of_error is None and unwritten is not None:
            return explain_unwritten(unwritten)
        tell(f"error: {error}")
        return int(ExitStatus.FAILED if status_of_error is None else status_of_error)
    unwritten = flush_output()
    return status if unwritten is None else explain_unwritten(unwritten)


def _tell_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a warning on one line, without its place in the source."""
    tell(f"warning: {' '.join(str(message).split())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns its exit status."""
    return run(_dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: megakd VERB [flags]\n\nverbs:")
        for verb, module in VERBS.items():
            print(f"  {verb:<12} {importlib.import_module(module).HELP}")
        print("\nmegakd VERB --help explains one verb.")
        return ExitStatus.COMPLETE
    if arguments[0] == "--version":
        from megakd import __version__

        print(__version__)
        return ExitStatus.COMPLETE
    if arguments[0] not in VERBS:
        tell(f"error: unknown verb '{arguments[0]}'; expected one of {', '.join(VERBS)}")
        return ExitStatus.USAGE
    return int(importlib.import_module(VERBS[arguments[0]]).main(arguments[1:]))


def _shield_children() -> None:
    """Keep the current folder off the import path of every Python process that this one, or a library, starts."""
    os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    sys.exit(main())
