"""Worker process that encodes shards of JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from megakd.pipeline.preprocess.shards import TextSettings, encode_shards
from megakd.work.worker_process import Report, Work, serve


def prepare(settings: dict[str, Any]) -> Work:
    """Load the engine; returns the function that encodes a job, which names a file and its first shard."""
    text_settings = TextSettings(**settings)
    engine = text_settings.build_engine(text_settings.build_tokenizer)

    def work(job: Mapping[str, Any], report: Report) -> None:
        encode_shards(text_settings, engine, job["file"], job["shard"], report)

    return work


if __name__ == "__main__":
    sys.exit(serve(prepare))
