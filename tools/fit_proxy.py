"""Fit a small model to score differences: `megakd proxy` beside the other tools, for torchrun."""

import sys

from megakd.__main__ import run
from megakd.pipeline.proxy.main import main

if __name__ == "__main__":
    sys.exit(run(main))
