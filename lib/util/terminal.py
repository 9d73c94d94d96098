"""Lines and tables for the width of a terminal; in a pipe or file, each line stays whole."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable
from functools import cache
from itertools import zip_longest
from typing import Any, TextIO

# a command stays whole, so that it can be copied; indented lines quote texts
WHOLE = re.compile(r" |.*\b(?:python \S+\.py|bash launch\.sh|langprune|pip|hf|llama-\w+) [a-z-]")
TABLE = re.compile(r"(?m)(^\| .*\n\| --.*(?:\n\| .*)*)")
CELL = re.compile(r"(?<!\\)\|")
WORDS = {"break_long_words": False, "break_on_hyphens": False}


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

    def wrapped(line: str) -> str:
        whole = len(line) <= width or WHOLE.match(line)
        return line if whole else textwrap.fill(line, width, subsequent_indent="  ", **WORDS)

    return "".join(
        _narrow(part, width) if number % 2 else "\n".join(map(wrapped, part.split("\n")))
        for number, part in enumerate(TABLE.split(text))
    )


def table_width(columns: Iterable[Iterable[str]], broken: bool = False) -> int:
    """Return the width of a table with these cells, the least if they are broken between words."""
    sizes = _sizes(columns, broken)
    return sum(sizes) + 3 * len(sizes) + 1


def _sizes(columns: Iterable[Iterable[str]], broken: bool = False) -> list[int]:
    return [max((3, *map(len, " ".join(c).split() if broken else c))) for c in columns]


def _narrow(table: str, width: int) -> str:
    """Return a table of `width` if its words allow it: few lines, and figures broken last."""
    if len(table.partition("\n")[0]) <= width:
        return table
    rows = [[cell.strip() for cell in CELL.split(line)[1:-1]] for line in table.splitlines()]
    aligned = [str.rjust if cell.endswith(":") else str.ljust for cell in rows.pop(1)]
    columns = list(zip(*rows, strict=True))
    if table_width(columns, broken=True) > width:
        return table
    figures = [c[1:] if a is str.rjust else () for c, a in zip(columns, aligned, strict=True)]
    figures = [max(map(len, cells), default=0) for cells in figures]
    least, sizes = _sizes(columns, broken=True), _sizes(columns)

    @cache
    def lines_of(place: int, size: int) -> list[int]:
        return [max(1, len(textwrap.wrap(cell, size, **WORDS))) for cell in columns[place]]

    while sum(sizes) + 3 * len(sizes) + 1 > width:
        lines = [lines_of(place, size) for place, size in enumerate(sizes)]
        height = sum(map(max, zip(*lines, strict=True)))

        def cost(place: int, lines: list = lines, height: int = height) -> tuple[bool, int, int]:
            narrowed = lines_of(place, sizes[place] - 1)
            if narrowed != lines[place]:
                others = lines[:place] + lines[place + 1 :]
                height = sum(map(max, zip(narrowed, *others, strict=True)))
            return sizes[place] <= figures[place], height, -sizes[place]

        free = [place for place, size in enumerate(sizes) if size > least[place]]
        sizes[min(free, key=cost)] -= 1
    cells = [
        [textwrap.wrap(c, s, **WORDS) for c, s in zip(row, sizes, strict=True)] for row in rows
    ]
    head, *body = (list(zip_longest(*row, fillvalue="")) for row in cells)
    lines = [*head, ["-" * size for size in sizes], *(line for row in body for line in row)]
    padded = ([a(*of) for a, *of in zip(aligned, line, sizes, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
