"""Which encoding a text that is not UTF-8 may be in, by trial of those that are still met."""

from __future__ import annotations

import codecs
import re

AROUND = 2**15  # bytes before and after the first that is not UTF-8, which are tried
CYRILLIC, GREEK = "а-яёєіїґўђјљњћџ", "α-ωάέήίόύώϊϋ"
CENTRAL, WESTERN = "a-záäăâąćčçďđéęěëíîľłńňóôöőřśšşťţúůüűýßźžż", "a-zàáâãäåæçèéêëìíîïñòóôõöøœùúûüß"
LETTERS = {"cp1251": CYRILLIC, "koi8-u": CYRILLIC, "cp866": CYRILLIC, "cp1253": GREEK}
LETTERS |= {"cp1250": CENTRAL, "cp1252": WESTERN}


def conversion(error: UnicodeDecodeError) -> str:
    """Return what to do with the bytes that could not be read as UTF-8."""
    sample = error.object[max(0, error.start - AROUND) : error.start + AROUND]
    likely, example, most = None, "", 0.6  # of the characters outside ASCII must be in words
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        likely, most = "utf-16", 1
    for name, letters in LETTERS.items():
        text = sample.decode(name, "replace")
        words = re.findall(rf"\b[{letters}{letters.upper()}][{letters}]*\b|[‘’“”„–—…«»]", text)
        foreign = [character for character in "".join(words) if not character.isascii()]
        share = len(foreign) / sum(not character.isascii() for character in text)
        if share > most:
            likely, example, most = name, max(words, key=lambda word: not word.isascii()), share
    if not likely:
        return "neither UTF-8 text nor in a known encoding; save it as UTF-8"
    seen = f" ({example!r})" if example else ""
    return f"not UTF-8 but likely {likely}{seen}; iconv -f {likely} -t utf-8 OLD > NEW"
