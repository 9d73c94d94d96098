"""Map languages to texts on the Hub: BCP 47 tags such as `uk` or `zh-Hant`, and FineWeb's names.

FineWeb is English. FineWeb2 has a subset for each other language, named with ISO 639-3 and script.
Its names are those of individual languages, not of macrolanguages, and have one Chinese script.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Set
from functools import cache

from ..util.errors import UserError

# the individual language in FineWeb2 for tags of macrolanguages
INDIVIDUAL = dict(
    pair.split("=")
    for pair in (
        "aka=twi ara=arb aym=ayr aze=azj cre=crk est=ekk ful=fuv grn=gug iku=ike kau=knc kok=gom "
        "kom=kpv kon=kng kur=kmr lav=lvs mlg=plt mon=khk msa=zsm nep=npi nor=nob oji=ojb ori=ory "
        "orm=gaz pus=pbt que=quz sqi=als swa=swh uzb=uzn yid=ydd zha=zyb zho=cmn"
    ).split()
)
# scripts that Japanese mixes; a short text may have only one of them
JAPANESE = "HIRAGANA KATAKANA KATAKANA-HIRAGANA IDEOGRAPHIC CJK".split()
# asks a chat model for an answer of a few sentences, with a text after it
REQUESTS = {
    "ar": "لخّص هذا النص في جملتين أو ثلاث:",
    "cs": "Shrň tento text ve dvou nebo třech větách:",
    "de": "Fasse diesen Text in zwei oder drei Sätzen zusammen:",
    "en": "Summarize this text in two or three sentences, in the language of the text:",
    "es": "Resume este texto en dos o tres frases:",
    "fr": "Résume ce texte en deux ou trois phrases :",
    "it": "Riassumi questo testo in due o tre frasi:",
    "ja": "この文章を二、三文で要約してください：",
    "ko": "이 글을 두세 문장으로 요약해 주세요:",
    "nl": "Vat deze tekst samen in twee of drie zinnen:",
    "pl": "Streść ten tekst w dwóch lub trzech zdaniach:",
    "pt": "Resuma este texto em duas ou três frases:",
    "tr": "Bu metni iki veya üç cümleyle özetle:",
    "uk": "Перекажи цей текст двома-трьома реченнями:",
    "zh": "用两三句话概括这段文字：",
}
SCRIPTS = {"Hans": "Hani", "Hant": "Hani", "Kore": "Hang"}


@cache
def script(letter: str) -> str:
    """Return the script of a letter from its Unicode name, such as `LATIN`; CJK for Japanese."""
    name = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if name in JAPANESE else name


def script_of(text: str) -> str | None:
    """Return the script of most letters in a text."""
    letters = Counter(script(letter) for letter in text if letter.isalpha())
    return max(letters, key=letters.get, default=None)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def is_in(written: str | None, known: Set[str], text: str) -> bool:
    """Return whether a text is in a script and, if it is Latin, half of its words are known."""
    words = words_of(text)
    if not words or script_of(text) != written:
        return bool(text.strip() and not words)
    return written != "LATIN" or sum(word in known for word in words) >= len(words) / 2


def codes_of(tag: str) -> set[str]:
    """Return a language's names in ISO 639-3: its own and that of an individual language."""
    from langcodes import Language

    try:
        code = Language.get(tag).to_alpha3()
    except (LookupError, ValueError):
        code = tag
    return {code, INDIVIDUAL.get(code, code)}


def language_text(tag: str) -> tuple[str, str]:
    """Return the language of a tag, as cards name it, and the built-in source of its text.

    Raises UserError for an unknown language; FineWeb2 may still lack the subset.
    """
    from langcodes import Language

    try:
        language = Language.get(tag)
        full = language.maximize()
        code = full.to_alpha3()
    except (LookupError, ValueError):  # unknown or malformed tag
        code = None
    if code is None or language.language in (None, "und", "mul", "zxx"):
        raise UserError(
            f"--language {tag}", "it is not a language", "Give a BCP 47 tag, such as uk"
        )
    if code == "eng":
        return "en", "fineweb"
    written = SCRIPTS.get(full.script, full.script)
    return language.language, f"fineweb2:{INDIVIDUAL.get(code, code)}_{written}"
