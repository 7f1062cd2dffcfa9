"""Verify an artefact: `megakd verify` as a script."""

import sys

from megakd.__main__ import run
from megakd.pipeline.datasets.verify import main

if __name__ == "__main__":
    sys.exit(run(main))
