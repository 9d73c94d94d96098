"""python -m lib.commands.export: see lib/commands/export/command.py."""

import sys

from lib.commands.export.command import main
from lib.util.command import run

if __name__ == "__main__":
    sys.exit(run(main))
