"""Commands in pipes: a reader that has seen enough, as `head` has, is no error."""

from __future__ import annotations

from pathlib import Path

from support import LIMIT, start

CODE = """
import sys
from lib.util import command
sys.exit(command.run(lambda argv: print(*range(10**6), sep="\\n")))
"""


def test_a_reader_that_has_gone_ends_a_command_without_a_word(tmp_path: Path) -> None:
    process = start(["-c", CODE], tmp_path)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=LIMIT) == 1


def test_so_does_one_that_never_came(tmp_path: Path) -> None:
    """What is printed fits into a buffer, and shows only when that is written at the end."""
    process = start(["-c", CODE.replace("10**6", "3")], tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=LIMIT) == 1
