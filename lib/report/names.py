"""What a linear is called in tables and pictures: its block, and its path inside the block."""

from __future__ import annotations

import re

BlockLinear = tuple[int, str]  # block, path of the linear inside it

_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


def block_and_linear(name: str) -> BlockLinear | None:
    """`model.layers.3.mlp.experts.7.w1.weight` -> (3, `mlp.experts.*.w1`); None outside blocks."""
    match = _NUMBERED.search(name)
    if match is None:
        return None
    path = name[match.end() :].removesuffix(".weight")
    return int(match[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", path).removesuffix(".*")
