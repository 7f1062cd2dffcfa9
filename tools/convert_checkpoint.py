"""Convert a model between forms: `megakd convert` under a name like that of Megatron's tool."""

import sys

from megakd.__main__ import run
from megakd.pipeline.convert.main import main

if __name__ == "__main__":
    sys.exit(run(main))
