"""Languages by their tags, and FineWeb2's names for them."""

from __future__ import annotations

from support import refused

from lib.data.documents import Corpus
from lib.data.languages import is_in, language_text, script_of
from lib.data.sources import parse_source

# of https://huggingface.co/datasets/HuggingFaceFW/fineweb-2, where a tag means several languages
SUBSETS = """
sq=als_Latn ar=arb_Arab az=azj_Latn zh=cmn_Hani et=ekk_Latn om=gaz_Latn gn=gug_Latn mn=khk_Cyrl
ku=kmr_Latn lv=lvs_Latn no=nob_Latn ne=npi_Deva or=ory_Orya ps=pbt_Arab mg=plt_Latn qu=quz_Latn
sw=swh_Latn ak=twi_Latn uz=uzn_Latn yi=ydd_Hebr ms=zsm_Latn de=deu_Latn ja=jpn_Jpan ko=kor_Hang
"""
OTHERS = {  # scripts, regions and other codes
    "ukr": ("uk", "fineweb2:ukr_Cyrl"),
    "pt-BR": ("pt", "fineweb2:por_Latn"),
    "zh-Hant-TW": ("zh", "fineweb2:cmn_Hani"),
    "yue": ("yue", "fineweb2:yue_Hani"),
    "sr-Latn": ("sr", "fineweb2:srp_Latn"),
    "uk_UA": ("uk", "fineweb2:ukr_Cyrl"),
    "en-GB": ("en", "fineweb"),
}


def test_a_language_has_the_subset_that_fineweb2_calls_it() -> None:
    for tag, subset in (pair.split("=") for pair in SUBSETS.split()):
        assert language_text(tag) == (tag, f"fineweb2:{subset}")
    for tag, text in OTHERS.items():
        assert language_text(tag) == text
        assert parse_source(text[1], "--language").sampled
    for tag in ("", "xx", "Ukrainian", "und", "mul", "українська"):
        assert "not a language" in refused(language_text, tag)


def test_japanese_is_one_script() -> None:
    written = script_of("吾輩は猫である。名前はまだ無い。コーヒーを飲む。")
    for text in ("東京都庁前駅", "はい", "コーヒー", "人々"):
        assert script_of(text) == written and is_in(written, set(), text)
    assert script_of("서울특별시") != written != script_of("Tokyo")


def test_a_language_without_text_is_one_line(hub) -> None:
    names = "Available: ['aai_Latn', 'aak_Latn']"
    hub.error = ValueError(f"BuilderConfig 'tlh_Latn' not found. {names}")
    source = parse_source(language_text("tlh")[1], "--language")
    line = refused(Corpus(source).documents, "test")
    assert "fineweb-2 has no tlh_Latn" in line and "aai_Latn" not in line
