"""Languages by their tags, FineWeb2's names for them, and how much of a text is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.data.documents import read_documents
from lib.data.hub import keep_text
from lib.data.languages import language_text
from lib.data.sources import parse_source
from lib.util.errors import UserError

# subsets that https://huggingface.co/datasets/HuggingFaceFW/fineweb-2 has
SUBSETS = """
afr_Latn als_Latn amh_Ethi arb_Arab asm_Beng azj_Latn bel_Cyrl ben_Beng bos_Latn bul_Cyrl cat_Latn
ces_Latn cmn_Hani cym_Latn dan_Latn deu_Latn ekk_Latn ell_Grek epo_Latn eus_Latn fas_Arab fil_Latn
fin_Latn fra_Latn gaz_Latn gle_Latn glg_Latn gug_Latn guj_Gujr hau_Latn heb_Hebr hin_Deva hrv_Latn
hun_Latn hye_Armn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kan_Knda kat_Geor kaz_Cyrl khk_Cyrl
khm_Khmr kir_Cyrl kmr_Latn kor_Hang lao_Laoo lit_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mlt_Latn
mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva ory_Orya pan_Guru pbt_Arab plt_Latn pol_Latn por_Latn
quz_Latn ron_Latn rus_Cyrl sin_Sinh slk_Latn slv_Latn snd_Arab som_Latn spa_Latn srp_Cyrl sun_Latn
swe_Latn swh_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tha_Thai tur_Latn twi_Latn uig_Arab ukr_Cyrl
urd_Arab uzn_Latn vie_Latn xho_Latn ydd_Hebr yor_Latn zsm_Latn zul_Latn
""".split()
TAGS = """
af sq am ar as az be bn bs bg ca cs zh cy da de et el eo eu fa fil fi fr om ga gl gn gu ha he hi hr
hu hy id is it jv ja kn ka kk mn km ky ku ko lo lt lv ml mr mk mt my nl nn no ne or pa ps mg pl pt
qu ro ru si sk sl sd so es sr su sv sw ta tt te tg th tr ak ug uk ur uz vi xh yi yo ms zu
""".split()


def test_every_language_has_the_subset_that_fineweb2_calls_it() -> None:
    texts = {tag: language_text(tag) for tag in TAGS}
    assert [texts[tag] for tag in TAGS] == [
        (tag, f"fineweb2:{subset}") for tag, subset in zip(TAGS, SUBSETS, strict=True)
    ]


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        ("ukr", ("uk", "fineweb2:ukr_Cyrl")),
        ("pt-BR", ("pt", "fineweb2:por_Latn")),
        ("zh-Hant-TW", ("zh", "fineweb2:cmn_Hani")),
        ("yue", ("yue", "fineweb2:yue_Hani")),
        ("sr-Latn", ("sr", "fineweb2:srp_Latn")),
        ("uk_UA", ("uk", "fineweb2:ukr_Cyrl")),
        ("en-GB", ("en", "fineweb")),
    ],
)
def test_scripts_regions_and_other_codes(tag: str, text: tuple[str, str]) -> None:
    assert language_text(tag) == text
    assert parse_source(text[1], "--language").sampled


@pytest.mark.parametrize("tag", ["", "xx", "Ukrainian", "und", "mul", "українська"])
def test_what_is_no_language(tag: str) -> None:
    with pytest.raises(UserError, match="is no language"):
        language_text(tag)


def test_the_first_texts_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {"test": ["за"] * 9, "train": (f"річка {n}" for n in range(10**9))}
    monkeypatch.setattr("lib.data.hub.load", lambda source, split: (texts[split], "c0ffee"))
    source = parse_source("fineweb2:ukr_Cyrl", "--language")
    keep_text(source, tmp_path / "uk", {"test": 100, "train": 20})
    kept = parse_source(str(tmp_path / "uk"), "--calibration_data")
    assert read_documents(kept, "test")[0] == texts["test"]
    assert read_documents(kept, "train")[0] == ["річка 0", "річка 1", "річка 2"]


def test_a_language_without_text_is_one_line(hub) -> None:
    hub.error = ValueError(
        "BuilderConfig 'tlh_Latn' not found. Available: ['aai_Latn', 'aak_Latn']"
    )
    with pytest.raises(UserError) as caught:
        read_documents(parse_source(language_text("tlh")[1], "--language"), "test")
    assert str(caught.value).endswith(": HuggingFaceFW/fineweb-2 has no tlh_Latn")
