"""The command `langprune NAME ...` that pip installs: what launch.sh starts, from any folder.

main.py and lib/ are installed side by side as in the repository. The folder goes to the front of
sys.path, as when main.py is run as a file.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

NAMES = "prune compress demo gguf languages overlap report sweep tasks ubertext unpack".split()


def main() -> None:
    """Run the command that the first argument names, and exit with its status."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in NAMES:
        del sys.argv[1]
        module = "main" if name == "prune" else f"lib.commands.{name}"
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif name == "--version":
        from lib import __version__

        print(f"langprune {__version__}")
    else:
        print(
            f"langprune NAME ..., where NAME is one of: {', '.join(NAMES)}; NAME --help says more"
        )
        sys.exit(0 if name in ("-h", "--help", "help") else 2)
