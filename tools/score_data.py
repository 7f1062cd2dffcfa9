"""Score a dataset with a model: `megakd score` beside the other tools, for torchrun."""

import sys

from megakd.__main__ import run
from megakd.pipeline.score.main import main

if __name__ == "__main__":
    sys.exit(run(main))
