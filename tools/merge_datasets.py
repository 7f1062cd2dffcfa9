"""Join indexed datasets: `megakd merge` under the name of Megatron's tool."""

import sys

from megakd.__main__ import run
from megakd.pipeline.datasets.merge import main

if __name__ == "__main__":
    sys.exit(run(main))
