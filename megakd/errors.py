"""Exit statuses and the exceptions that carry them, which callers of any megakd command can rely on."""

import enum


class ExitStatus(enum.IntEnum):
    """Exit status of every megakd command."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    DATA_BUDGET = 3
    MISMATCH = 4
    CORRUPT = 5
    NO_SPACE = 6
    STOPPED = 75


class UsageError(ValueError):
    """A flag, a path or a combination of settings that cannot work."""

    status = ExitStatus.USAGE


class DataBudgetError(ValueError):
    """More bad records than the budget allows."""

    status = ExitStatus.DATA_BUDGET


class MismatchError(ValueError):
    """Two artefacts that do not belong together; the message shows both values."""

    status = ExitStatus.MISMATCH


class CorruptError(ValueError):
    """A file that was damaged or cut: its size, structure or content differs from what was written."""

    status = ExitStatus.CORRUPT


class NoSpaceError(OSError):
    """The disk, a quota or a file-size limit is full; the files that were there before are untouched."""

    status = ExitStatus.NO_SPACE


class NonFiniteError(ValueError):
    """A NaN or an infinity in a loss or a gradient; the step was not applied."""

    status = ExitStatus.FAILED


class StoppedBySignal(Exception):
    """The run was asked to stop and has saved its state."""

    status = ExitStatus.STOPPED
