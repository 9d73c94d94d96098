"""A chat model answers prompts; what it says is kept, gone on with, and can be trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import chats
import pytest
import tiny
from approval import Words
from support import Done, call, mistake, program_of, succeed

from lib.commands import dialogues
from lib.data.documents import Corpus
from lib.data.languages import REQUESTS
from lib.data.sources import parse_sources
from lib.data.templates import sample_of_dialogue

pytestmark = pytest.mark.usefixtures("elsewhere")
BASE = ["model", "a.jsonl", "--data", "texts"]
FLAGS = ["--count", "12", "--tokens", "24", "--device", "cpu", "--seed", "3"]
main = program_of("dialogues")


@pytest.fixture(autouse=True)
def model(elsewhere: None) -> None:
    """A model whose answers end soon: any token may be the end."""
    model = tiny.tiny_llama()
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = list(range(3, 300, 8))
    tiny.write_model("model", model, chats.tokenizer_with(chats.GEMMA))
    tiny.write_texts("texts", tiny.sentences(60, words=4), 1)


@pytest.fixture
def any_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")


def rows(name: str = "a.jsonl") -> list[list[dict[str, str]]]:
    lines = Path(name).read_text("utf-8").split("\n")
    return [json.loads(line)["messages"] for line in lines if line]


def write(*argv: object) -> Done:
    return succeed(*argv, *FLAGS, program=main)


@pytest.mark.usefixtures("any_script")
def test_prompts_are_answered_and_none_is_lost() -> None:
    asked = chats.some(40)
    chats.write(Path("chat"), asked, asked[:1])
    assert "a.jsonl: 12 dialogues" in write("model", "a.jsonl", "--data", "chat").out
    first = rows()
    prompts = [each[0]["content"] for each in asked]
    for messages in first:
        assert [each["role"] for each in messages] == ["user", "assistant"]
        assert messages[0]["content"] in prompts and messages[1]["content"].strip()
    assert len({messages[0]["content"] for messages in first}) == len(first) == 12
    write("model", "b.jsonl", "--data", "chat")
    assert rows("b.jsonl") == first

    lines = Path("a.jsonl").read_bytes().splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:-5])  # as if killed while writing
    write("model", "a.jsonl", "--data", "chat")
    assert rows()[:7] == first[:7]
    assert len({messages[0]["content"] for messages in rows()}) == len(rows()) == 12


def test_what_is_left_out_is_counted(monkeypatch: pytest.MonkeyPatch, words: Words) -> None:
    texts = [f"тиха ріка {number}" for number in range(60)]  # the request is no part of the script
    tiny.write_texts("texts", texts, 1)  # passages of plain text
    encode = tiny.tiny_tokenizer(add_bos=False).encode
    answers = [encode("старим містом"), encode("a quiet town"), 24 * [5], []]
    monkeypatch.setattr("lib.run.completions.continue_rows", lambda *_: answers)
    words("on_the_way.txt", write(*BASE, "--batch_size", "4").out, "dialogues that are left out")
    for asked, answered in rows():
        request, text = asked["content"].split("\n\n")
        assert request == REQUESTS["en"] and text in texts
        assert answered["content"] == "старим містом"


@pytest.mark.usefixtures("any_script")
def test_an_answer_that_does_not_end_is_cut_after_its_last_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of eight end, as of a chat model that is asked for more than its limit."""
    said = {'Ріка. Над 3.5 містом! "Тихо." Ліс': 'Ріка. Над 3.5 містом! "Тихо."'}
    said |= {"川が。流れる": "川が。", "Ріка над 3.5": ""}
    assert {text: dialogues.whole_sentences(text) for text in said} == said
    tokenizer = tiny.tiny_tokenizer(add_bos=False)
    ended, endless = tokenizer.encode("quiet town"), tokenizer.encode("the river. a quiet town")
    endless = (endless * 24)[:24]
    answers = [ended, *[endless] * 3]
    monkeypatch.setattr("lib.run.completions.continue_rows", lambda *_: answers)
    write(*BASE, "--batch_size", "4")
    contents = [answered["content"] for _, answered in rows()]
    assert contents[0] == "quiet town" and contents[1].endswith("the river.")


def test_one_text_has_many_passages() -> None:
    paragraphs = [" ".join(tiny.sentences(90, seed)) for seed in range(40)]
    Path("own.txt").write_text("\n\n".join(paragraphs), "utf-8")
    (source,) = parse_sources(["own.txt"], "--data")
    found = list(dialogues._passages(Corpus(source), random.Random(0)))
    assert len(found) >= 40 and len({*found}) == len(found)
    assert sum(map(len, found)) > 0.9 * sum(map(len, paragraphs))


def test_too_little_to_calibrate_on_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(model: object, asked: list, tokens: int, _: object) -> list[list[int]]:
        return len(asked) * [24 * [5]]

    Path("blank.jsonl").write_text('{"text": " "}\n', "utf-8")
    done = call("model", "a.jsonl", "--data", "blank.jsonl", *FLAGS, program=main)
    assert done.status == 3 and done.err.startswith("error: --data blank.jsonl: ")
    done = call(*BASE, *FLAGS, "--fill", "9000", program=main)
    assert done.status == 3 and "error: MODEL model: the dialogues fill" in done.err
    Path("a.jsonl").unlink()
    monkeypatch.setattr("lib.run.completions.continue_rows", endless)
    done = call(*BASE, *FLAGS, program=main)
    assert done.status == 3
    assert "only 0 of its 24 answers are of use (24 that do not end)" in done.err


@pytest.mark.usefixtures("any_script")
def test_it_ends_with_as_many_tokens_as_asked_for() -> None:
    done = write("model", "a.jsonl", "--data", "texts", "--fill", "400")
    tokenizer, (source,) = chats.tokenizer_with(chats.GEMMA), parse_sources(["a.jsonl"], "--data")
    documents = Corpus(source).documents("train")
    lengths = [len(sample_of_dialogue(tokenizer, dialogue).ids) for dialogue in documents]
    assert f"{len(lengths)} dialogues of {sum(lengths):,} tokens" in done.out
    assert sum(lengths[:-1]) < 400 <= sum(lengths) and 2 < len(lengths) < 12
    first = rows()
    write("model", "a.jsonl", "--data", "texts", "--fill", "400")
    assert rows() == first
    write("model", "b.jsonl", "--data", "texts", "--fill", "200")
    write("model", "b.jsonl", "--data", "texts", "--fill", "400")
    assert rows("b.jsonl")[:2] == first[:2]


@pytest.mark.usefixtures("any_script")
@pytest.mark.parametrize("cut", [0, 3, 30])
def test_a_last_row_without_a_line_break_stays(cut: int) -> None:
    """As many editors leave it; a row that was cut off goes. Separators of lines end no row."""
    written = [{"messages": chats.said(f"q\u2028{n}", f"three\u0085{n}")} for n in range(3)]
    text = "\n".join(json.dumps(each, ensure_ascii=False) for each in written)
    text = text[: len(text) - cut]
    Path("a.jsonl").write_text(text, "utf-8")
    write(*BASE)
    kept = written[: text.count("\n") + (cut == 0)]
    assert rows()[: len(kept)] == [each["messages"] for each in kept] and len(rows()) == 12
    assert "q\u20282" not in str(rows()[len(kept) :])


@pytest.mark.usefixtures("any_script")
@pytest.mark.parametrize("other", ["weights", "prompts", "seed"])
def test_a_file_of_another_model_is_not_continued(other: str, words: Words) -> None:
    write(*BASE)
    before, more = Path("a.jsonl").read_bytes(), ["--count", "14"]
    if other == "weights":  # the same shapes
        model = tiny.tiny_llama()
        model.lm_head.weight.data *= 1.01
        tiny.write_model("model", model, chats.tokenizer_with(chats.GEMMA))
    elif other == "prompts":
        tiny.write_texts("texts", tiny.sentences(60, 5, words=4), 1)
    else:
        more += ["--seed", "4"]
    error = mistake(*BASE, *FLAGS, *more, program=main)
    assert str(error).startswith("OUT a.jsonl: ") and f"line 1 was written with {other}" in str(
        error
    )
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.full
@pytest.mark.usefixtures("any_script")
def test_a_model_that_also_sees_answers() -> None:
    model = tiny.VISION["Qwen3-VL"]()
    model.generation_config.eos_token_id = list(range(3, 300, 8))
    tiny.write_model("model", model, chats.tokenizer_with(chats.LLAMA_3))
    write(*BASE)
    assert rows()
