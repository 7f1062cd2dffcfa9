"""A logits store out of a journal: `megakd collect` beside the other tools."""

import sys

from megakd.__main__ import run
from megakd.pipeline.capture.collect_main import main

if __name__ == "__main__":
    sys.exit(run(main))
