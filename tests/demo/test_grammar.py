"""The demo's texts: the two grammars, the words they are filled with, and the files written."""

from __future__ import annotations

import json
import re

import pytest

from lib.demo import en, text, uk


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return text.compose(documents=20)


def test_the_same_seed_gives_the_same_stories(texts):
    assert text.compose(documents=20) == texts
    assert text.compose(documents=20, seed=1) != texts
    assert len(set(texts["uk"] + texts["en"])) == 40


def test_stories_are_whole_and_long_enough(texts):
    for stories in texts.values():
        for story in stories:
            assert len(story) >= text.CHARACTERS
            assert not re.search(r"[{}<>|/_]|  | [.,?!]", story)
            assert re.search(r"[.!?”]$", story)
            assert all(line[0].isupper() or line[0] in "—“" for line in story.splitlines())


def test_languages_share_no_letter(texts):
    assert not re.search("[A-Za-z]", "".join(texts["uk"]))
    assert not re.search("[А-Яа-яІіЇїЄєҐґ]", "".join(texts["en"]))


def test_whatever_begins_gets_a_capital_letter():
    assert text.capitalised("one. two? three! four, five") == "One. Two? Three! Four, five"
    assert text.capitalised("— де ніж? — спитав Іван.\n— тут. — він") == (
        "— Де ніж? — спитав Іван.\n— Тут. — Він"
    )
    assert text.capitalised("“where?” asked she. “there,” “here”") == (
        "“Where?” asked she. “there,” “Here”"
    )


def test_texts_are_written_as_main_reads_them(tmp_path, texts):
    text.write_texts(tmp_path, texts, test=5)
    for language, stories in texts.items():
        for name, part in (("train", stories[:-5]), ("test", stories[-5:])):
            lines = (tmp_path / language / f"{name}.jsonl").read_text("utf-8").splitlines()
            assert [json.loads(line) for line in lines] == [{"text": story} for story in part]


@pytest.mark.parametrize(
    ("entry", "case", "form"),
    [
        ("книга/fa", "loc", "книзі"),
        ("хустка/fa/хусток", "pgen", "хусток"),
        ("груша/fj", "ins", "грушею"),
        ("станція/fi", "pgen", "станцій"),
        ("полиця/fy", "pgen", "полиць"),
        ("ярмарок>ярмарк/m", "loc", "ярмарку"),
        ("сарай/mj", "gen", "сараю"),
        ("вірш/mz", "pnom", "вірші"),
        ("якір>якор/mr", "gen", "якоря"),
        ("стілець>стільц/ms", "acc", "стілець"),
        ("стілець>стільц/ms", "ins", "стільцем"),
        ("фермер/Ma", "acc", "фермера"),
        ("учитель/Ms", "acc", "учителя"),
        ("лікар/Mr", "dat", "лікареві"),
        ("Андрій/Mj", "voc", "Андрію"),
        ("Дмитро/Mo", "gen", "Дмитра"),
        ("яблуко/no", "loc", "яблуці"),
        ("поле/ne", "gen", "поля"),
    ],
)
def test_ukrainian_declension(entry, case, form):
    assert format(uk.noun(entry), case) == form


def test_every_ukrainian_noun_has_all_its_forms():
    words = uk.WORDS
    entries = [*words["people"], *words["homes"], words["currency"], *sum(words["cities"], [])]
    for topic in words["topics"].values():
        entries += [*topic["things"], *sum(topic["jobs"], [])]
        entries += [place.split(" ", 1)[1] for place in topic["places"]]
    for entry in entries:
        forms = uk.noun(entry).forms
        assert list(forms) == uk.CASES
        assert all(re.fullmatch("[А-Яа-яІіЇїЄєҐґ’-]{2,}", form) for form in forms.values()), entry


def test_ukrainian_agreement():
    hammer, book = uk.noun("молоток>молотк/ma"), uk.noun("книга/fa")
    phrase = uk.Phrase("синій", book)
    assert [f"{phrase:{case}}" for case in ("nom", "gen", "acc", "pins")] == [
        "синя книга",
        "синьої книги",
        "синю книгу",
        "синіми книгами",
    ]
    assert f"{uk.Phrase('старий', hammer):loc}" == "старому молотку"
    counts = [f"{uk.Count(number, hammer)}" for number in (1, 2, 5, 12)]
    assert counts == ["один молоток", "два молотки", "п’ять молотків", "дванадцять молотків"]
    assert f"{uk.Count(1, book):acc}" == "одну книгу"
    assert f"{uk.Count(2, book)} {uk.Count(2, book):a/b/c/d}" == "дві книги d"
    assert f"{uk.Count(25, uk.noun('гривня/fy/гривень')):figures}" == "25 гривень"


def test_ukrainian_past():
    woman, man = uk.noun("Олена/fa"), uk.noun("Іван/Ma")
    assert [uk.past("купити", who) for who in (man, woman)] == ["купив", "купила"]
    assert [uk.past("знайти", who) for who in (man, woman)] == ["знайшов", "знайшла"]


def test_ukrainian_euphony():
    assert uk._euphony("вона у хаті, він у хаті, у Одесі") == "вона в хаті, він у хаті, в Одесі"
    assert uk._euphony("з Ужгорода, з собою") == "з Ужгорода, із собою"


def test_english_agreement():
    assert f"{en.Thing('letter', 'urgent'):a}" == "an urgent letter"
    assert f"{en.Thing('berry'):s} {en.Thing('box'):s}" == "berries boxes"
    assert f"{en.Count(1, 'shelf')}, {en.Count(2, 'shelf')}" == "one shelf, two shelves"
    assert f"{en.Count(1, 'box'):was/were} {en.Count(0, 'box'):was/were}" == "was were"
    rose = en.Person("Rose", "f")
    assert f"{rose} {rose:s} {rose:he/she}" == "Rose Rose’s she"
