"""Capture a teacher's output distribution: `megakd capture` beside the other tools, for torchrun."""

import sys

from megakd.__main__ import run
from megakd.pipeline.capture.main import main

if __name__ == "__main__":
    sys.exit(run(main))
