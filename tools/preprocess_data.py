"""Tokenize a corpus: `megakd preprocess` under the name of Megatron's tool, with its flags."""

import sys

from megakd.__main__ import run
from megakd.pipeline.preprocess.main import main

if __name__ == "__main__":
    sys.exit(run(main))
