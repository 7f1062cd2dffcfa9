"""Turn a dataset into another tokenizer's: `megakd retokenize`."""

import sys

from megakd.__main__ import run
from megakd.pipeline.retokenize.main import main

if __name__ == "__main__":
    sys.exit(run(main))
