"""Show scores and what is kept of them: `megakd report` under the name of Megatron's kind of tool."""

import sys

from megakd.__main__ import run
from megakd.pipeline.report.main import main

if __name__ == "__main__":
    sys.exit(run(main))
