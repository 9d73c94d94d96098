"""The entry point of the command that pip installs: it runs main.py from the installed folder.

main.py and lib/ are installed side by side as in the repository. The folder goes to the front of
sys.path, as when main.py is run as a file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run main.py with this process's arguments, and exit with its status."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(import_module("lib.util.command").run(import_module("main").main))
