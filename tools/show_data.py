"""Show a dataset: `megakd show` as a script."""

import sys

from megakd.__main__ import run
from megakd.pipeline.datasets.show import main

if __name__ == "__main__":
    sys.exit(run(main))
