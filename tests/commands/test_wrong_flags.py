"""A wrong flag of any command is refused before anything slow is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lib.commands.__main__ import NAMES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from lib.commands.__main__ import start
for argv in map(str.split, sys.argv[1:]):
    try:
        start(argv)
        print(argv, "was accepted")
    except (SystemExit, ValueError):
        slow = {"torch", "transformers", "scipy", "matplotlib", "pandas"} & {*sys.modules}
        print(*[f"{argv} imports {name}" for name in slow])
"""
WRONG = [f"{name} --nonsense" for name in NAMES]
WRONG += ["compress m out", "compress m out --data uk --quantize q5", "gguf m out.txt"]
WRONG += ["compress m out --data uk --recover_rank 0", "compress m out --language xx"]
WRONG += ["compress m out --data uk --save here", "compress m out --data uk --for packed mlx"]
WRONG += ["export m . --to mlx", "gguf m out.gguf --type q5", "dialogues m out.txt --data uk"]


def test_wrong_flags_import_nothing_slow() -> None:
    command = [sys.executable, "-c", PROGRAM, *WRONG]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.strip(), done.stdout
