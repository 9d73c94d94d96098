"""The shape of a story in any language: an opening, paragraphs of several kinds, an ending."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

KINDS = ("acts", "acts", "talks", "talks", "counts", "scenes", "facts")  # those twice come oftener


def tell(
    rng: random.Random,
    characters: int,
    templates: Mapping[str, Sequence[str]],
    fill: Callable[[str], str],
) -> str:
    """A story of at least `characters` characters, one paragraph or turn of a talk a line.

    `fill` makes a sentence of a template. No paragraph has the same template twice.
    """

    def paragraph(kind: str, sentences: int) -> str:
        return " ".join(map(fill, rng.sample(templates[kind], sentences)))

    paragraphs = [paragraph("openings", 1)]
    while sum(map(len, paragraphs)) < characters:
        kind = rng.choice(KINDS)
        paragraphs.append(paragraph(kind, 1 if kind == "talks" else rng.randint(2, 4)))
    return "\n".join([*paragraphs, paragraph("endings", 1)])
