"""The demo: its grammars, its training, and the runs that it starts."""

from __future__ import annotations

import json
import random
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.demo import demo
from lib.demo import en as demo_en
from lib.demo import model as demo_model
from lib.demo import text as demo_text
from lib.demo import uk as demo_uk
from lib.run.flags import build_parser, check_flags
from lib.util.errors import UserError

TINY = demo_model.Recipe(
    vocabulary=300, window=16, width=16, inner=32, blocks=2, heads=2, batch=4, steps=2, warm_up=1
)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return demo_text.compose(documents=20)


def test_the_same_seed_gives_the_same_stories(texts):
    assert demo_text.compose(documents=20) == texts
    assert demo_text.compose(documents=20, seed=1) != texts
    assert len(set(texts["uk"] + texts["en"])) == 40


def test_stories_are_whole_and_long_enough(texts):
    for stories in texts.values():
        for story in stories:
            assert len(story) >= demo_text.CHARACTERS
            assert not re.search(r"[{}<>|/_]|  | [.,?!]", story)
            assert re.search(r"[.!?”]$", story)


def test_languages_share_no_letter(texts):
    assert not re.search("[A-Za-z]", "".join(texts["uk"]))
    assert not re.search("[А-Яа-яІіЇїЄєҐґ]", "".join(texts["en"]))


@pytest.mark.parametrize(
    ("entry", "case", "form"),
    [
        ("книга/fa", "loc", "книзі"),
        ("хустка/fa/хусток", "pgen", "хусток"),
        ("груша/fj", "ins", "грушею"),
        ("станція/fi", "pgen", "станцій"),
        ("полиця/fy", "pgen", "полиць"),
        ("ярмарок>ярмарк/m", "loc", "ярмарку"),
        ("стілець>стільц/ms", "acc", "стілець"),
        ("стілець>стільц/ms", "ins", "стільцем"),
        ("учитель/Ms", "acc", "учителя"),
        ("лікар/Mr", "dat", "лікареві"),
        ("Андрій/Mj", "voc", "Андрію"),
        ("Дмитро/Mo", "gen", "Дмитра"),
        ("яблуко/no", "loc", "яблуці"),
        ("поле/ne", "gen", "поля"),
    ],
)
def test_ukrainian_declension(entry, case, form):
    assert format(demo_uk.noun(entry), case) == form


def test_ukrainian_agreement():
    knife, book = demo_uk.noun("молоток>молотк/ma"), demo_uk.noun("книга/fa")
    phrase = demo_uk.Phrase("синій", book)
    assert [f"{phrase:{case}}" for case in ("nom", "gen", "acc", "pins")] == [
        "синя книга",
        "синьої книги",
        "синю книгу",
        "синіми книгами",
    ]
    assert f"{demo_uk.Phrase('старий', knife):loc}" == "старому молотку"
    counts = [f"{demo_uk.Count(number, knife)}" for number in (1, 2, 5, 12)]
    assert counts == ["один молоток", "два молотки", "п’ять молотків", "дванадцять молотків"]
    assert f"{demo_uk.Count(1, book):acc}" == "одну книгу"
    assert f"{demo_uk.Count(2, book)} {demo_uk.Count(2, book):a/b/c/d}" == "дві книги d"


def test_english_agreement():
    assert f"{demo_en.Thing('letter', 'urgent'):a}" == "an urgent letter"
    assert f"{demo_en.Thing('berry'):s} {demo_en.Thing('box'):s}" == "berries boxes"
    assert f"{demo_en.Count(1, 'shelf')}, {demo_en.Count(2, 'shelf')}" == "one shelf, two shelves"


def test_texts_are_written_as_main_reads_them(tmp_path, texts):
    demo_text.write_texts(tmp_path, texts, test=5)
    for language, stories in texts.items():
        for name, part in (("train", stories[:-5]), ("test", stories[-5:])):
            lines = (tmp_path / language / f"{name}.jsonl").read_text("utf-8").splitlines()
            assert [json.loads(line) for line in lines] == [{"text": text} for text in part]


def test_training_is_kept_for_the_next_time(tmp_path, texts):
    folder = tmp_path / "model"
    assert demo_model.trained_model(folder, texts, TINY)
    weights = (folder / "model.safetensors").read_bytes()
    assert not demo_model.trained_model(folder, texts, TINY)
    assert demo_model.trained_model(folder, texts, TINY, fresh=True)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert demo_model.trained_model(folder, {"en": texts["en"]}, TINY)
    assert (folder / "model.safetensors").read_bytes() != weights


def test_tokenizer_begins_a_text_and_gives_it_back(tmp_path, texts):
    demo_model.trained_model(tmp_path / "model", texts, TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for story in (texts["uk"][0], texts["en"][0]):
        ids = tokenizer(story).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == story
    assert len(tokenizer) == model.config.vocab_size


def test_an_interrupted_training_leaves_nothing(tmp_path, texts, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.trained_model(tmp_path / "model", texts, TINY)
    assert not list(tmp_path.iterdir())


def test_training_learns(texts):
    """Forty steps bring the loss well below that of guessing all tokens alike."""
    import dataclasses

    import torch

    recipe = dataclasses.replace(TINY, steps=40, rate=1e-2)
    tokenizer = demo_model.train_tokenizer(texts, recipe)
    model = demo_model.train(tokenizer, texts, recipe)
    windows = demo_model._draw(
        random.Random(1), [demo_model._stream(tokenizer, texts["uk"])], recipe
    )
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss < 0.9 * torch.tensor(float(len(tokenizer))).log().item()


def test_runs_have_flags_that_main_accepts(tmp_path):
    found = list(demo.steps(tmp_path))
    assert len({step.name for step in found}) == len(found) == 15
    for step in found:
        parser = build_parser()
        args = parser.parse_args(demo.flags_of(step, tmp_path))
        check_flags(parser, args)


def test_a_failed_run_says_why_and_where(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="wrong: main.py failed: .*--nsamples 0.*wrong.txt"):
        demo.run_all([demo.Step("wrong", ("--nsamples", "0"))], tmp_path, at_once=1)
