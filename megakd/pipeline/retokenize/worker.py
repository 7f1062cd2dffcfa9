"""Worker process that retokenizes shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from megakd.pipeline.retokenize.shards import Retokenizer, RetokenizeSettings
from megakd.work.worker_process import Report, Work, serve


def prepare(settings: dict[str, Any]) -> Work:
    """Load both tokenizers; returns the function that does a job, which names a shard and its documents."""
    retokenizer = Retokenizer(RetokenizeSettings(**settings))

    def work(job: Mapping[str, Any], report: Report) -> None:
        retokenizer.encode_shard(job["shard"], job["first"], job["stop"], report)

    return work


if __name__ == "__main__":
    sys.exit(serve(prepare))
