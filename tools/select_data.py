"""Keep the best samples by their scores: `megakd select` under the name of Megatron's kind of tool."""

import sys

from megakd.__main__ import run
from megakd.pipeline.select.main import main

if __name__ == "__main__":
    sys.exit(run(main))
