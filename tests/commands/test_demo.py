"""The demo from the first story to the report, on a model that hardly learns."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from support import content, launched
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.commands import demo, demo_model
from lib.commands.demo_model import DemoTraining, train_model
from lib.data.documents import read_documents
from lib.data.sources import parse_source
from lib.util.errors import UserError

TINY = DemoTraining(
    vocabulary=300, window=16, width=16, inner=32, blocks=2, heads=2, batch=4, steps=2, warm_up=1
)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return demo.read_stories(10)


@pytest.mark.usefixtures("elsewhere")
def test_the_whole_demo(tmp_path: Path) -> None:
    said = launched(["demo", "--small"], tmp_path)
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:4:2])
        for line in said.splitlines()
        if line.startswith(("| dense", "| admm"))
    }
    expected = {("dense", "none"), ("admm", "uk"), ("admm + recovery", "uk")}
    assert rows == expected
    assert all(row in Path("demo/report.md").read_text("utf-8") for row in said.split("\n\n")[1:2])
    files = list(Path("demo/runs").rglob("results.json"))
    assert len(files) == len(expected) and list(Path("demo").glob("*.png"))
    for file in files:
        run = json.loads(file.read_text("utf-8"))
        assert list(run["perplexity"]) == ["uk", "en"] and run["flags"]["device"] == "cpu"


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("demo", "--folder demo: is a file"),
        ("demo/thesis.txt", "--folder demo: holds thesis.txt, but no demo.txt"),
        ("demo/model/training.json", "--folder demo: holds model, but no demo.txt"),
    ],
)
def test_what_is_not_a_demo_is_left_alone(file: str, complaint: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("mine")
    before = content(".")
    with pytest.raises(UserError, match=complaint):
        demo.demo(Path("demo"), demo.SMALL)
    assert content(".") == before


def test_stories_are_whole_and_share_no_letter() -> None:
    stories = demo.read_stories(525)
    assert all(len(set(texts)) == 525 for texts in stories.values())
    for text in [*stories["uk"], *stories["en"]]:
        assert len(text) >= 1600 and re.search(r"[.!?”]$", text)
        assert not re.search(r"[{}<>|/_]|  | [.,?!]", text)
    assert not re.search("[A-Za-z]", "".join(stories["uk"]))
    assert not re.search("[А-Яа-яІіЇїЄєҐґ]", "".join(stories["en"]))


def test_texts_are_written_as_main_reads_them(tmp_path: Path) -> None:
    stories = demo.read_stories(9)
    demo.write_texts(tmp_path, stories, 2)
    for language, texts in stories.items():
        source = parse_source(str(tmp_path / language), "--eval_data")
        for split, part in (("train", texts[:7]), ("test", texts[7:])):
            assert read_documents(source, split)[0] == part


def test_a_model_is_kept_that_would_come_out_the_same(tmp_path: Path, texts) -> None:
    folder = tmp_path / "model"
    assert train_model(folder, texts, TINY) and not train_model(folder, texts, TINY)
    weights = (folder / "model.safetensors").read_bytes()
    assert train_model(folder, texts, TINY, fresh=True)
    assert (folder / "model.safetensors").read_bytes() == weights
    for other in ((texts, dataclasses.replace(TINY, seed=1)), ({"en": texts["en"]}, TINY)):
        assert train_model(folder, *other)
        assert (folder / "model.safetensors").read_bytes() != weights
    (folder / demo_model.SETTINGS).unlink()  # as an interruption leaves it
    assert train_model(folder, texts, TINY)


def test_tokenizer_begins_a_text_and_gives_it_back(tmp_path: Path, texts) -> None:
    train_model(tmp_path / "model", texts, TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for story in (texts["uk"][0], texts["en"][0]):
        ids = tokenizer(story).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == story
    assert len(tokenizer) == model.config.vocab_size


def test_training_learns(texts) -> None:
    """Forty steps bring the loss well below that of guessing all tokens alike."""
    training = dataclasses.replace(TINY, steps=40, rate=1e-2)
    tokenizer = demo_model.train_tokenizer(texts, training)
    model = demo_model.train(tokenizer, texts, training)
    stream = torch.tensor(tokenizer("".join(texts["uk"])).input_ids)
    windows = demo_model.draw(random.Random(1), [stream], training)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss < 0.9 * math.log(len(tokenizer))


def test_every_language_is_drawn_as_often_and_the_rate_rises_stays_and_falls() -> None:
    streams = [torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.long)]
    windows = demo_model.draw(random.Random(0), streams, TINY)
    assert windows.shape == (TINY.batch, TINY.window) and windows.float().mean() == 0.5
    training = DemoTraining(steps=100, warm_up=10, rate=1.0)
    rates = [demo_model.rate(step, training) for step in range(100)]
    assert rates[:11] == pytest.approx([*(step / 10 for step in range(1, 11)), 1.0])
    assert set(rates[10:50]) == {1.0}
    assert rates[50:] == sorted(rates[50:], reverse=True) and 0.05 < rates[-1] < 0.1
