"""What the command that pip installs calls: main.py, in the folder where it was installed.

There main.py and lib/ lie side by side as in the repository, so that folder becomes the first one
in which modules are looked for, as it is where main.py is run as a file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run main.py with this process's arguments, and leave with its exit status."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(import_module("lib.util.command").run(import_module("main").main))
