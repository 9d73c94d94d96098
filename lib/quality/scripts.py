"""The writing systems that letters belong to."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

OWN_SHARE = 0.01  # of a text's letters: a script with fewer is foreign to it


@cache
def script_of(letter: str) -> str:
    """Return the first word of a letter's Unicode name, such as LATIN, CYRILLIC or CJK."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def count_scripts(texts: Iterable[str]) -> Counter[str]:
    """Count the letters of each script."""
    return Counter(script_of(letter) for text in texts for letter in text if letter.isalpha())


def own_scripts(texts: Iterable[str]) -> set[str]:
    """Return the scripts that at least OWN_SHARE of the texts' letters belong to."""
    counts = count_scripts(texts)
    return {script for script, count in counts.items() if count >= OWN_SHARE * counts.total()}
