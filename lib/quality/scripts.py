"""Which writing system a letter belongs to."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

OWN_SHARE = 0.01  # of a text's letters, from which on a script is one of its own


@cache
def script_of(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def count_scripts(texts: Iterable[str]) -> Counter[str]:
    """How many letters of each script there are."""
    return Counter(script_of(one) for text in texts for one in text if one.isalpha())


def own_scripts(texts: Iterable[str]) -> set[str]:
    """The scripts that at least OWN_SHARE of the texts' letters belong to."""
    counts = count_scripts(texts)
    return {script for script, count in counts.items() if count >= OWN_SHARE * counts.total()}
