"""python -m lib.gguf: see lib/gguf/command.py."""

import sys

from lib.gguf.command import main
from lib.util.command import run

if __name__ == "__main__":
    sys.exit(run(main))
