"""A chat model answers prompts; what it says is kept, gone on with, and can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import chats
import pytest
import tiny
import torch

from lib.commands import dialogues
from lib.util.command import run

pytestmark = pytest.mark.usefixtures("elsewhere")
BASE = ["model", "a.jsonl"]
FLAGS = ["--count", "12", "--tokens", "24", "--device", "cpu", "--seed", "3"]


@pytest.fixture(autouse=True)
def model(elsewhere: None) -> None:
    """A model whose answers end soon: any token may be the end."""
    model = tiny.tiny_llama()
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = list(range(3, 300, 8))
    tiny.write_model("model", model, chats.tokenizer_with(chats.GEMMA))


def rows(name: str) -> list[list[dict[str, str]]]:
    lines = Path(name).read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_prompts_are_answered_and_none_is_lost(capsys, monkeypatch) -> None:
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    asked = chats.some(40)
    chats.write(Path("chat"), asked, asked[:1])
    argv = [*BASE, "--data", "chat", *FLAGS]
    assert run(dialogues.main, argv) == 0
    first = rows("a.jsonl")
    assert len(first) == 12 and "a.jsonl: 12 dialogues" in capsys.readouterr().out
    prompts = [each[0]["content"] for each in asked]
    for messages in first:
        assert [each["role"] for each in messages] == ["user", "assistant"]
        assert messages[0]["content"] in prompts and messages[1]["content"].strip()
    assert len({messages[0]["content"] for messages in first}) == 12
    assert run(dialogues.main, ["model", "b.jsonl", *argv[2:]]) == 0 and rows("b.jsonl") == first

    lines = Path("a.jsonl").read_bytes().splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:-5])  # as if killed while writing
    assert run(dialogues.main, argv) == 0
    again = rows("a.jsonl")
    assert again[:7] == first[:7] and len(again) == 12
    assert len({messages[0]["content"] for messages in again}) == 12


def test_what_is_left_out_is_counted(capsys, monkeypatch) -> None:
    texts = [f"the old river {number}" for number in range(60)]
    tiny.write_texts("texts", texts, 1)  # passages of plain text
    encode = tiny.tiny_tokenizer(add_bos=False).encode
    answers = [encode("a quiet town"), encode("ріка"), 24 * [5], []]
    monkeypatch.setattr("lib.run.completions.continue_rows", lambda *_: answers)
    assert run(dialogues.main, [*BASE, "--data", "texts", "--batch_size", "4", *FLAGS]) == 0
    left_out = "12 that are in another script than the prompts, 12 that do not end, 12 that are"
    assert f"a.jsonl: 12 dialogues; left out: {left_out} empty" in capsys.readouterr().out
    for asked, answered in rows("a.jsonl"):
        assert asked["content"] in texts and answered["content"] == "a quiet town"


def test_no_chat_model(capsys, monkeypatch) -> None:
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)
    monkeypatch.setattr(
        "lib.run.completions.continue_rows", lambda model, asked, _: len(asked) * [24 * [5]]
    )
    assert run(dialogues.main, [*BASE, "--data", "texts", *FLAGS]) == 1
    assert "only 0 of 8 answers end within 24 tokens" in capsys.readouterr().err


def test_a_last_row_without_a_line_break_stays() -> None:
    """As many editors leave it; a row that was cut off goes."""
    written = [{"messages": chats.said(f"q{number}", f"a{number}")} for number in range(3)]
    text = "\n".join(map(json.dumps, written))
    Path("a.jsonl").write_text(text)
    assert len(dialogues._answered(Path("a.jsonl"), {})) == 3
    assert Path("a.jsonl").read_text() == text + "\n"
    for cut_off in (text[:-3], text[: text.index("\n") - 3]):
        Path("a.jsonl").write_text(cut_off)
        assert len(dialogues._answered(Path("a.jsonl"), {})) == cut_off.count("\n")
        assert Path("a.jsonl").read_text() == cut_off[: cut_off.rfind("\n") + 1]


@pytest.mark.parametrize("other", ["model", "prompts", "seed"])
def test_a_file_of_another_model_is_not_continued(other: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)
    assert run(dialogues.main, [*BASE, "--data", "texts", *FLAGS]) == 0
    before = Path("a.jsonl").read_bytes()
    argv = ["model", "a.jsonl", "--data", "texts", *FLAGS, "--count", "14"]
    if other == "model":  # the same shapes, other weights
        model = tiny.tiny_llama()
        model.lm_head.weight.data *= 1.01
        tiny.write_model("model", model, chats.tokenizer_with(chats.GEMMA))
    elif other == "prompts":
        tiny.write_texts("texts", tiny.sentences(60, 5, words=4), 1)
    else:
        argv += ["--seed", "4"]
    capsys.readouterr()
    assert run(dialogues.main, argv) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    name = "weights" if other == "model" else other
    assert f"OUT a.jsonl: line 1 was written with {name}" in line
    assert Path("a.jsonl").read_bytes() == before


def test_rows_of_ones_own_are_continued(monkeypatch) -> None:
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)
    row = {"messages": chats.said("one\u2028two", "three\u0085four")}
    Path("a.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert run(dialogues.main, [*BASE, "--data", "texts", *FLAGS]) == 0
    lines = Path("a.jsonl").read_text("utf-8").split("\n")
    assert len(lines) == 13 and json.loads(lines[0]) == row


def test_a_model_that_also_sees_answers(capsys, monkeypatch) -> None:
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    model = tiny.VISION["Qwen3-VL"]()
    model.generation_config.eos_token_id = list(range(3, 300, 8))
    tiny.write_model("model", model, chats.tokenizer_with(chats.LLAMA_3))
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)
    argv = [*BASE, "--data", "texts", *FLAGS, "--count", "4"]
    assert run(dialogues.main, argv) == 0, capsys.readouterr().err
    assert len(rows("a.jsonl")) == 4


def test_weights_are_read_from_safetensors_alone(capsys) -> None:
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)
    torch.save(tiny.tiny_llama().state_dict(), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    assert run(dialogues.main, [*BASE, "--data", "texts", *FLAGS]) == 1
    assert "only safetensors are read" in capsys.readouterr().err
