"""Cut a dataset into samples that end with a sentence: `megakd pack`."""

import sys

from megakd.__main__ import run
from megakd.pipeline.datasets.pack import main

if __name__ == "__main__":
    sys.exit(run(main))
