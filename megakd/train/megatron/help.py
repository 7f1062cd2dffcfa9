"""Text of ``--help-megatron``: every flag of Megatron-LM, with its meaning here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from megakd.config.tree import Leaf
from megakd.train.megatron.defaults import DEFAULTS
from megakd.train.megatron.dialect import TABLES
from megakd.train.megatron.machine_flags import ELSEWHERE
from megakd.train.megatron.names import SHARED

_HEADS = {
    "same": "accepted: the case here anyway, or without effect on the result",
    "means": "accepted, and translated",
    "refused": "refused",
}


def megatron_help(leaves: Sequence[Leaf]) -> list[str]:
    """Return the lines of the help. leaves: options of the training configuration."""
    ours = {leaf.flag: leaf for leaf in leaves}
    lines = ["Megatron-LM's flags in a line of 'megakd train'", "", "accepted with Megatron's meaning:"]
    for flag in SHARED:
        lines += _row(flag, ours[flag].field.metadata["help"])
    for verdict, head in _HEADS.items():
        for title, table in TABLES.items():
            rows = [entry for entry in table if entry.verdict == verdict]
            if rows:
                lines += ["", f"{head} ({title}):"]
                for entry in rows:
                    name = f"{entry.flag} {'|'.join(entry.values)}" if entry.values else entry.flag
                    lines += _row(name, entry.text)
    lines += ["", "refused, as a group:"]
    for start, reason in ELSEWHERE.items():
        lines += _row(f"{start}*", reason)
    lines += ["", "defaults that differ (Megatron's; ours):"]
    for row in DEFAULTS:
        lines += _row(row.flag, f"{row.megatron}; {row.ours}")
    return lines


def _row(left: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, 76)
    head = [f"  {left:<40}  {first}"] if len(left) <= 40 else [f"  {left}", " " * 44 + first]
    return [*head, *(" " * 44 + line for line in rest)]
