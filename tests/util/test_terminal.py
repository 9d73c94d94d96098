"""Text from untrusted files on a terminal: nothing it obeys, nothing it hides, and no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import LIMIT, start

from lib.util import command
from lib.util.errors import UserError
from lib.util.terminal import one_line


@pytest.mark.parametrize(
    "invisible",
    ["\u200b", "\u200e", "\u200f", "\u061c", "\u202e", "\u2066", "\ufeff", "\u2060", "\u00ad"]
    + ["\U000e0001", "\U000e0041", "\U000e007f", "\U000e0100", "\u3164", "\u034f", "\x1b", "\x9b"]
    + ["\x00", "\x7f", "\ud800"],
)
def test_invisible_and_control_characters_are_dropped(invisible: str) -> None:
    assert one_line(f"a{invisible}b{invisible}") == "ab"


@pytest.mark.parametrize(
    "text", ["Було, є й буде.", "می‌خواهم", "👩‍🚒 ❤️", "क्‍ष", "日本", "é e\u0301"]
)
def test_what_a_reader_sees_stays(text: str) -> None:
    assert one_line(text) == text


def test_all_blanks_become_one() -> None:
    assert one_line(" a\r\nb\t\u2028 c\u00a0\u3000d\x85e ") == "a b c d e"


def test_an_error_can_not_steer_the_terminal(capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("--model m: quant_method \x1b]0;title\x07 \x1b[2J\nis unknown\u202e")

    assert command.run(main, []) == 1
    assert capsys.readouterr().err == "error: --model m: quant_method ]0;title [2J is unknown\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_never_raises(encoding: str, tmp_path: Path) -> None:
    code = (
        "import sys; from lib.util import command; from lib.util.errors import UserError\n"
        "def main(argv):\n"
        "    print('тест: 1.5 GiB')\n"
        "    raise UserError('--save тека: is a file')\n"
        "sys.exit(command.run(main))"
    )
    process = start(["-c", code], tmp_path, PYTHONIOENCODING=encoding)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert out == rf"{escaped('тест')}: 1.5 GiB" + "\n"
    assert err == f"error: --save {escaped('тека')}: is a file\n"


def escaped(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def test_streams_that_are_no_files_stay_as_they_are(capsys: pytest.CaptureFixture) -> None:
    assert command.run(lambda argv: print("так"), []) == 0
    assert capsys.readouterr().out == "так\n" and sys.stdout.encoding
