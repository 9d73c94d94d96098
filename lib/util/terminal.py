"""Lines and tables for the width of a terminal; in a pipe or file, each line stays whole."""

from __future__ import annotations

import re
import shutil
import textwrap
from itertools import zip_longest
from typing import Any, TextIO

# a command stays whole, so that it can be copied; indented lines quote texts
WHOLE = re.compile(r" |.*\b(?:python \S+\.py|bash launch\.sh|langprune|pip|hf|llama-\w+) [a-z-]")
CELL = re.compile(r"(?<!\\)\|")


class Terminal:
    """A stream of a terminal whose long lines are broken between words."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(fitted(text, shutil.get_terminal_size().columns))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def fitted(text: str, width: int) -> str:
    """Return text in lines of up to `width` characters, cells of Markdown tables in several lines.

    Words, commands, indented lines and tables of words that are too long stay as they are.
    """
    lines = []
    for part in re.split(r"(?m)((?:^\|.*(?:\n|\Z))+)", text):
        lines.append(_narrow(part, width) if part.startswith("|") else _wrap(part, width))
    return "".join(lines)


def _wrap(text: str, width: int) -> str:
    options = dict(subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        line
        if len(line) <= width or WHOLE.match(line)
        else "\n".join(textwrap.wrap(line, width, **options))
        for line in text.split("\n")
    )


def _narrow(table: str, width: int) -> str:
    """Return a table with the widest of its columns narrowed, as far as their words allow."""
    rows = [[c.strip() for c in CELL.split(line)[1:-1]] for line in table.splitlines()]
    flush = [str.rjust if cell.endswith(":") else str.ljust for cell in rows.pop(1)]
    columns = list(zip(*rows, strict=True))
    least = [max(3, *map(len, " ".join(column).split())) for column in columns]
    sizes = [max(3, *map(len, column)) for column in columns]
    while sum(sizes) + 3 * len(sizes) + 1 > width:
        free = [(size, place) for place, size in enumerate(sizes) if size > least[place]]
        if not free:
            return table
        sizes[max(free)[1]] -= 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size) for cell, size in zip(row, sizes, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            line = [f(part, size) for f, part, size in zip(flush, parts, sizes, strict=True)]
            lines.append(f"| {' | '.join(line)} |")
        if row is rows[0]:
            lines.append(f"| {' | '.join('-' * size for size in sizes)} |")
    return "\n".join(lines) + "\n" * table.endswith("\n")
