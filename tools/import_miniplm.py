"""Read MiniPLM's own shards and scores: `megakd import-miniplm`."""

import sys

from megakd.__main__ import run
from megakd.pipeline.miniplm.main import main

if __name__ == "__main__":
    sys.exit(run(main))
