"""python -m lib.commands.gguf: see lib/commands/gguf/command.py."""

import sys

from lib.commands.gguf.command import main
from lib.util.command import run

if __name__ == "__main__":
    sys.exit(run(main))
