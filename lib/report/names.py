"""What a linear is called in tables and pictures: its block, and its path inside it."""

from __future__ import annotations

import re

Place = tuple[int, str]  # block, path of the linear inside it

_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


def place(name: str) -> Place | None:
    """`model.layers.3.mlp.experts.7.w1.weight` -> (3, `mlp.experts.*.w1`); None outside blocks."""
    found = _NUMBERED.search(name)
    if found is None:
        return None
    rest = name[found.end() :].removesuffix(".weight")
    return int(found[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", rest).removesuffix(".*")
