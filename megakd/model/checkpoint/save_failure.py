"""Reasons why a checkpoint could not be written: a full disk, a quota, a file-size limit, or something else.

megatron's writers are processes of their own, and torch's serialisation loses the error number (it calls a short write
'unexpected pos'), so the reason is found by writing to the files once more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megakd.artefacts.durable_files import FULL, explain_no_space
from megakd.errors import NoSpaceError

_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def explained(partial: Path) -> Iterator[None]:
    """Turn a failure to write the checkpoint in ``partial`` into one error, and remove its files.

    All ranks call it. Failures of the writers are raised on every rank; failures of the first rank's own work only
    there.

    Raises:
        NoSpaceError: with the path. OSError: any other failure to write.
    """
    try:
        with explain_no_space(partial):
            yield
    except CheckpointException as error:
        causes: list[OSError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(causes, _no_room(partial))
        _remove(partial)
        _raise(partial, next((cause for cause in causes if cause is not None), None), error)
    except RuntimeError as error:
        cause = _no_room(partial)
        if cause is None:
            raise
        _remove(partial)
        _raise(partial, cause, error)
    except NoSpaceError:
        _remove(partial)
        raise


def _no_room(partial: Path) -> OSError | None:
    """Return the error that keeps this rank's files from growing; None if they grow, or if it has none."""
    rank = dist.get_rank()
    try:
        for path in sorted(partial.iterdir()):
            if path.name.startswith(f"__{rank}_") or (rank == 0 and not path.name.startswith("__")):
                with open(path, "ab", buffering=0) as stream:
                    stream.write(bytes(_PROBE_BYTES))
                    if stream.write(bytes(1)) != 1:
                        return OSError(FULL[0], os.strerror(FULL[0]))
                    os.fsync(stream.fileno())
    except OSError as error:
        return OSError(error.errno, os.strerror(error.errno or 0)) if error.errno in FULL else None
    return None


def _raise(partial: Path, cause: OSError | None, error: BaseException) -> None:
    before = "earlier ones are as they were, and the same command continues from the newest"
    if cause is not None:
        reason = (
            f"{cause.strerror}: the checkpoint could not be written; free some space or raise the limit (ulimit -f)"
        )
        raise NoSpaceError(cause.errno, f"{reason}; {before}", os.fspath(partial)) from error
    lines = [line for line in str(error).splitlines() if line.strip()]
    raise OSError(
        f"{partial}: the checkpoint could not be written: {lines[-1] if lines else error!r}; {before}"
    ) from error


def _remove(partial: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
