"""Markdown: any text as plain words in a cell, and tables that are readable as plain text."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from .errors import one_line

EMPTY = "–"
# characters with a meaning in Markdown, on the Hub and elsewhere; `_` has none inside a word
_MARKUP = re.compile(r"[\\`*\[\]~#$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")


def escape(text: str) -> str:
    """Return any text as plain words in a cell of a table: one line, no markup, no HTML."""
    line = html.escape(_MARKUP.sub(r"\\\g<0>", one_line(text)), quote=False)
    return line.replace("|", "&#124;") or EMPTY


def padded_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; its first `left` columns are flush left, the others flush right."""
    cells = [[one_line(cell).replace("|", "\\|") for cell in line] for line in [head, *body]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    aligned = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    padded = [[a(c, w) for a, c, w in zip(aligned, line, widths, strict=True)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])
