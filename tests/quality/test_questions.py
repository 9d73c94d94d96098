"""Questions from plain text: fair options, the same for the same seed, from the text alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from lib.quality.questions import (
    CONTEXT,
    CONTINUATION,
    LEAST_CONTEXT,
    LEAST_CONTINUATION,
    WORD,
    Question,
    continuations,
    digest,
    last_words,
    read_pairs,
)
from lib.util.errors import UserError

WORDS = "місто річка дерево сонце вікно книга дорога пташка хмара камінь зірка листя".split()


def document(seed: int, sentences: int = 12) -> str:
    draw = random.Random(seed)
    rows = [" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(sentences)]
    return " ".join(rows[:6]) + "\n" + " ".join(rows[6:])


TEXTS = [document(seed) for seed in range(30)]


@pytest.mark.parametrize("make", [last_words, continuations])
def test_the_seed_decides(make) -> None:
    one, again, other = make(TEXTS, 0), make(TEXTS, 0), make(TEXTS, 1)
    assert one == again and digest(one) == digest(again)
    assert one != other and digest(one) != digest(other)
    assert make(TEXTS, 0, count=20) == one[:20]
    assert len(set(one)) == len(one)


def test_last_words_are_among_words_of_their_kind() -> None:
    questions = last_words(TEXTS, 0)
    counts = Counter(word for text in TEXTS for word in WORD.findall(text) if word.islower())
    assert len(questions) > 100
    for question in questions:
        words = [option.strip() for option in question.options]
        assert len(set(words)) == 4 and len({len(word) for word in words}) == 1
        assert len({counts[word].bit_length() for word in words}) == 1
        assert any(question.context + question.options[0] + "." in text for text in TEXTS)
        assert LEAST_CONTEXT <= len(question.context) <= CONTEXT


def test_continuations_follow_and_the_others_are_of_other_texts() -> None:
    questions = continuations(TEXTS, 0)
    assert len(questions) > 100
    for question in questions:
        right, *wrong = (option.strip() for option in question.options)
        asked = " ".join(f"{question.context} {right}".split())
        (own,) = [text for text in TEXTS if asked in " ".join(text.split())]
        assert len({right, *wrong}) == 4 and not any(one in own for one in wrong)
        assert all(any(one in text for text in TEXTS) for one in wrong)
        assert all(LEAST_CONTINUATION <= len(one) <= CONTINUATION for one in (right, *wrong))


def test_one_long_text_is_asked_about_too() -> None:
    assert len(continuations(["\n".join(TEXTS)], 0)) > 100
    assert len(last_words(["\n".join(TEXTS)], 0)) > 100


@pytest.mark.parametrize("make", [last_words, continuations])
@pytest.mark.parametrize("texts", [[], [""], ["Слово."], ["今天天气很好。我们去公园吧。" * 20]])
def test_texts_without_sentences_give_no_question(make, texts: list[str]) -> None:
    assert make(texts, 0) == []


def test_pairs_are_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"good": "Я йду додому. ", "bad": "Я йду до дому."}, {"good": "a", "bad": "b"}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows), "utf-8")
    first, second = read_pairs(str(file))
    assert first == Question("", ("Я йду додому.\n", "Я йду до дому.\n"))
    assert second == Question("", ("a\n", "b\n"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no pair"),
        ("{", "line 1: not JSON"),
        ('{"good": "a", "bad": "b"}\n[1]', "line 2: needs two texts"),
        ('{"good": "a"}', "line 1: needs two texts"),
        ('{"good": "a", "bad": " "}', "line 1: needs two texts"),
        ('{"good": "a", "bad": "a "}', "line 1: both texts are the same"),
    ],
)
def test_what_is_no_pair_is_told(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(UserError, match=f"--pairs {file}: {problem}"):
        read_pairs(str(file))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pairs .*nowhere: can't be read"):
        read_pairs(str(tmp_path / "nowhere"))
