"""Process that exports one checkpoint of a run, beside it: ``python -m megakd.train.hf_export_process JOB``.

JOB is JSON: ``load``, the checkpoint; ``save``, the folder; ``options`` of `plan_export`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from megakd.artefacts.manifest import read_manifest
from megakd.model.checkpoint.record import read_record
from megakd.model.huggingface.export import export
from megakd.model.huggingface.export_plan import plan_export
from megakd.model.huggingface.exported import MANIFEST
from megakd.model.huggingface.shard_writer import MAX_SHARD_BYTES
from megakd.work.die_with_parent import die_with_parent

_NICE = 10  # the run comes first


def main(job: str) -> int:
    """Export, and return the exit status that a verb would have."""
    die_with_parent()
    os.nice(_NICE)
    told = json.loads(job)
    try:
        record, folder = read_record(told["load"], role="the checkpoint"), Path(told["save"])
        before = read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
        if before is not None and before.parents["checkpoint"] != record.fingerprint:
            shutil.rmtree(folder)  # of an iteration that came again, after the run went back to an earlier one
        export(plan_export(record, **told["options"]), folder, max_shard_bytes=MAX_SHARD_BYTES)
    except (ValueError, OSError) as error:
        if not hasattr(error, "status") and not isinstance(error, OSError):
            raise
        print(error, file=sys.stderr)
        return int(getattr(error, "status", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
