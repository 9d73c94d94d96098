"""All wording lies in files of tests/words, which a person has read and approved.

    words("card.txt", card, "a local model")      # the fixture; an entry of the file for each name

A test fails where what is said now differs. `pytest --approve` writes what is said now into the
files instead, without asking: read the diff before it is committed.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from lib.util.terminal import WHOLE, fitted

FOLDER = Path(__file__).resolve().parent / "words"
LOCK = FileLock(Path(tempfile.gettempdir(), "approved-words.lock"))  # workers of one test run
ENTRY = re.compile(r"^=== (.+)\n", re.MULTILINE)
VOLATILE = {  # what differs from machine to machine, and from release to release
    r"(?:/\S*)?/pytest-of-[^/\s]+/pytest-\d+/(?:popen-\w+/)?[^/\s]+": "TMP",
    r"\b[\d,.]+(?:e[-+]\d+)? (?:[KMGT]i)?B\b": "N B",
    r"\b\d+(?:\.\d+)? (?=s\b|min\b|seconds\b)": "N ",
    r"(cannot be (?:reached|loaded|read|imported)) \(.*?\)(?=[.:] )": r"\1 (...)",  # a library's
    r"\b(langprune|torch|transformers) \d+\.\d+[\w.+]*": r"\1 VERSION",
}
COMPLETION = re.compile(r"(?m)^( *(?:dense|model): ).*")  # what a model continues
CHOICES = re.compile(r"\(choose from [^)]*\)")


def normalised(text: str) -> str:
    """Without seconds, sizes of memory, temporary folders, versions and spaces at ends of lines."""
    for pattern, instead in VOLATILE.items():
        text = re.sub(pattern, instead, text)
    text = CHOICES.sub(lambda match: match[0].replace("'", ""), text)  # Python 3.12 quotes none
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def without_numbers(text: str) -> str:
    """For what a run says: which figures there are and not which values, so no widths either."""
    text = re.sub(r"(?<![\w.])[-+]?\d[\d,]*\.\d+(?:e[-+]\d+)?\b", "#", normalised(text))
    text = re.sub(COMPLETION, r"\1#", text)
    rows = text.splitlines()
    return "\n".join(re.sub(r" +|-{3,}", _narrow, row) if "| " in row else row for row in rows)


def _narrow(match: re.Match) -> str:
    return match[0][: 3 if "-" in match[0] else 1]


def entries(file: Path) -> dict[str, str]:
    """{name: what was approved} of a file."""
    if not file.exists():
        return {}
    _, *parts = ENTRY.split(file.read_text("utf-8"))
    return {
        name: text.rstrip("\n") + "\n" for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def write(file: Path, approved: dict[str, str]) -> None:
    file.parent.mkdir(exist_ok=True)
    parts = (f"=== {name}\n{approved[name]}" for name in sorted(approved))
    file.write_text("".join(parts), "utf-8")


class Words:
    """Compares with what was approved, or approves."""

    def __init__(self, approve: bool) -> None:
        self.approve = approve

    def __call__(self, name: str, text: str, entry: str) -> None:
        """The text must be that of an entry of a file, but for what is volatile."""
        file, now = FOLDER / name, normalised(text)
        if self.approve:
            with LOCK:
                write(file, entries(file) | {entry: now})
            return
        before = entries(file).get(entry, "")
        if now != before:
            lines = before.splitlines(), now.splitlines()
            diff = difflib.unified_diff(*lines, "approved", "now", lineterm="", n=1)
            pytest.fail(
                f"tests/words/{name}, {entry}: other words than approved. If they are better, run "
                "pytest --approve on this test.\n" + "\n".join(diff),
                pytrace=False,
            )

    def terminal(self, text: str, entry: str, widths: tuple[int, ...] = (80, 60)) -> None:
        """As `__call__`, of text in a pipe that is shown in terminals, each digit as 0."""
        assert text.replace("\n", "").isprintable()
        text = re.sub(r"\d", "0", re.sub(COMPLETION, r"\1#", normalised(text)))
        for width in widths:
            shown = fitted(text, width)
            for line in shown.splitlines():
                assert len(line) <= width or WHOLE.match(line) or " " not in line.strip(), line
            self("terminal.txt", shown, f"{entry}, {width} columns")

    def only(self, name: str, known: set[str]) -> None:
        """A file has no entries but these."""
        file = FOLDER / name
        if self.approve:
            with LOCK:
                write(file, {key: text for key, text in entries(file).items() if key in known})
        assert entries(file).keys() == known
