"""A chat model is rounded, trained and measured on dialogues, and as before without them."""

from __future__ import annotations

from pathlib import Path

import chats
import pytest
import tiny
from support import QUICK, call, results, succeed

BASE = ["--model", "model", *QUICK, "--calibration_data", "uk=1", "chat=2", "--eval_data", "chat"]
RECOVER = ["--recover", "1024", "--recover_lr", "0.01"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name, template in dict(model=chats.QWEN_3, gemma=chats.GEMMA, plain=None).items():
        tokenizer = chats.tokenizer_with(template)
        model = tiny.tiny_llama()
        tiny.write_model(folder / name, model, tokenizer)
    tiny.write_texts(folder / "uk", train=200, test=4)
    chats.write(folder / "chat", chats.some(200), chats.some(40, seed=1))
    return folder


def test_rounded_trained_and_measured_on_dialogues(tmp_path: Path) -> None:
    flags = ["--trim_vocabulary", "--quantize", "q4_0", *RECOVER, "--completions", "1"]
    done = succeed(*BASE, *flags, "--save", tmp_path / "out", "--save_model", tmp_path / "new")
    found = results(tmp_path / "out")
    assert "learning rate 0.01, distillation only" in done.out
    assert found["recovery"]["cross_entropy"] == 0
    (test,) = found["evaluation"]
    assert test["dialogues"] == 40 and test["answer_tokens"] < test["tokens"] / 2
    assert test["kl"] > 0 and test["dense"]["perplexity"] > 1
    shares = [each["share"] for each in found["recovery"]["text"]["sources"]]
    assert shares == pytest.approx([1 / 3, 2 / 3], abs=0.1)
    (answers,) = found["answers"]
    assert answers["prompts"] == 32 and answers["limit"] > 40
    for name in ("dense", "model"):
        assert 0 <= answers[name]["ended"] <= 32 and 0 < answers[name]["tokens"]
    (shown,) = found["completions"]
    assert shown["prompt"] == chats.some(1, seed=1)[0][0]["content"]
    assert shown.keys() == {"test", "prompt", "dense", "model"}
    card = (tmp_path / "new/README.md").read_text("utf-8")
    assert shown["prompt"] in done.out and shown["prompt"] not in card
    assert all("chat, answers that end, of 32" in text for text in (done.out, card))


def test_a_template_without_dialogues_changes_nothing(tmp_path: Path) -> None:
    """Nor does it with dialogues that are read as plain text."""
    texts = ["--calibration_data", "uk", "--eval_data", "uk"]
    found = []
    for name in ("gemma", "plain"):
        flags = ["--model", name, *QUICK, *texts, "--quantize", "q4_0", *RECOVER]
        done = succeed(*flags, "--save", tmp_path / name)
        found.append(results(tmp_path / name))
        assert "distillation only" not in done.out
    assert found[0]["evaluation"] == found[1]["evaluation"]
    assert "answers" not in found[0]


def test_without_a_template(tmp_path: Path) -> None:
    flags = ["--model", "plain", *QUICK, "--calibration_data", "chat", "--prune_method", "wanda"]
    done = call(*flags)
    (line,) = done.complaints
    assert done.status == 1 and "--model plain: its tokenizer has no chat template" in line
    succeed(*flags, "--no_chat_template", "--save", tmp_path / "out")
    assert "answers" not in results(tmp_path / "out")
