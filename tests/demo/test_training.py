"""The demo's model: its training, its tokenizer, and what is kept of them."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from support import raising
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.demo import model as demo_model
from lib.demo.model import DemoTraining, train_model
from lib.demo.text import read_stories

TINY = DemoTraining(
    vocabulary=300, window=16, width=16, inner=32, blocks=2, heads=2, batch=4, steps=2, warm_up=1
)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return read_stories(10)


def test_training_is_kept_for_the_next_time(tmp_path, texts):
    folder = tmp_path / "model"
    assert train_model(folder, texts, TINY)
    weights = (folder / "model.safetensors").read_bytes()
    assert not train_model(folder, texts, TINY)
    assert train_model(folder, texts, TINY, fresh=True)
    assert (folder / "model.safetensors").read_bytes() == weights
    for other in ((texts, dataclasses.replace(TINY, seed=1)), ({"en": texts["en"]}, TINY)):
        assert train_model(folder, *other)
        assert (folder / "model.safetensors").read_bytes() != weights


def test_tokenizer_begins_a_text_and_gives_it_back(tmp_path, texts):
    train_model(tmp_path / "model", texts, TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for story in (texts["uk"][0], texts["en"][0]):
        ids = tokenizer(story).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == story
    assert len(tokenizer) == model.config.vocab_size


def test_an_interrupted_training_leaves_nothing(tmp_path, texts):
    with raising(KeyboardInterrupt(), "training", 1), pytest.raises(KeyboardInterrupt):
        train_model(tmp_path / "model", texts, TINY)
    assert not list(tmp_path.iterdir())


def test_training_learns(texts):
    """Forty steps bring the loss well below that of guessing all tokens alike."""
    training = dataclasses.replace(TINY, steps=40, rate=1e-2)
    tokenizer = demo_model.train_tokenizer(texts, training)
    model = demo_model.train(tokenizer, texts, training)
    stream = demo_model._stream(tokenizer, texts["uk"])
    windows = demo_model._draw(random.Random(1), [stream], training)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss < 0.9 * math.log(len(tokenizer))


def test_every_language_is_drawn_as_often():
    streams = [torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.long)]
    windows = demo_model._draw(random.Random(0), streams, TINY)
    assert windows.shape == (TINY.batch, TINY.window)
    assert windows.float().mean() == 0.5


def test_the_rate_rises_stays_and_falls():
    training = DemoTraining(steps=100, warm_up=10, rate=1.0)
    rates = [demo_model._rate(step, training) for step in range(100)]
    assert rates[:11] == pytest.approx([*(step / 10 for step in range(1, 11)), 1.0])
    assert set(rates[10:50]) == {1.0}
    assert rates[50:] == sorted(rates[50:], reverse=True) and 0.05 < rates[-1] < 0.1
