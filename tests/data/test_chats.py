"""Rows of chat sets become dialogues, rendered by the model's own template, with a mask."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import chats
import pyarrow
import pytest
import tiny
from pyarrow import parquet
from support import refused

from lib.commands.trim.parts import Fast
from lib.data import templates
from lib.data import windows as data
from lib.data.chats import Dialogue
from lib.data.documents import Corpus
from lib.data.samples import Windows
from lib.data.sources import parse_source
from lib.data.templates import document_text, prompt_of, sample_of_dialogue
from lib.data.training import training_windows
from lib.vocabulary.counts import count_tokens

FLAG = "--calibration_data"
ASKED, ANSWERED = "Де тече ріка?", "Над старим містом."
SAID = chats.said(ASKED, ANSWERED)
SHAPES = [
    {"messages": SAID},
    {"conversation": [each | {"toxic": False} for each in SAID]},
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    {"prompt": ASKED, "completion": ANSWERED},
    {"prompt": SAID[:1], "completion": SAID[1:]},
    {"instruction": ASKED, "input": "", "output": ANSWERED},
    {"instruction": "Де тече", "input": "ріка?", "response": ANSWERED},
    {"inputs": ASKED, "targets": ANSWERED, "language_code": "ukr"},
    {"messages": [{"role": each["role"], "content": [{"text": each["content"]}]} for each in SAID]},
]
OF_USER = dict(role="user", content="a")
WRONG = [
    ({"words": "a"}, "only words. Name one with --column, "),
    ({"messages": [OF_USER | {"role": "narrator"}]}, "the role 'narrator'"),
    ({"messages": ["a"]}, "the role None"),
    ({"messages": [OF_USER | {"role": ["user"]}]}, "the role ['user']"),
    ({"messages": [OF_USER | {"content": ["a"]}]}, "the content ['a'] is not text"),
    ({"messages": [OF_USER | {"content": [{"text": 5}]}]}, "5}] is not text"),
]


def corpus_of(folder: Path, *rows: dict) -> Corpus:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return Corpus(parse_source(str(folder / "rows.jsonl"), FLAG))


def test_rows_of_every_shape(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for row in SHAPES:
        expected = json.loads(json.dumps(SAID))
        if row.get("input"):
            expected[0]["content"] = "Де тече\n\nріка?"
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        table = Corpus(parse_source(str(tmp_path / "a.parquet"), FLAG))
        for corpus in (corpus_of(tmp_path, row), table):
            (document,) = corpus.documents("train")
            assert document.messages == expected
    for row, problem in WRONG:
        line = refused(corpus_of(tmp_path, {"messages": SAID}, row).documents, "train")
        assert f"{tmp_path}/rows.jsonl, line 2: " in line and problem in line
    rows = [{"messages": SAID}, {"messages": chats.said("a", " ")}, {"messages": []}]
    assert len(corpus_of(tmp_path, *rows).documents("train")) == 1
    assert "2 rows without" in caplog.text


@pytest.mark.parametrize("template", chats.MARKS, ids="llama gemma qwen mistral".split())
def test_the_mask_is_on_answers_and_their_end(template: str) -> None:
    tokenizer, end = chats.tokenizer_with(template), chats.ENDS[template]
    turns = chats.said("the old", "river runs", "past a", "quiet town")
    sample = sample_of_dialogue(tokenizer, Dialogue(json.dumps(turns)))
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(sample.ids) == text
    assert (sample.ids == 0).sum() == ("bos_token" in template)  # no second BOS
    counted = tokenizer.decode(sample.ids[sample.mask])
    blank = " " * (template == chats.MISTRAL)
    first, last = (f"{blank}{each}{end}" for each in ("river runs", "quiet town"))
    thinks = template == chats.QWEN_3  # which writes earlier turns anew
    prompt = tokenizer.decode(prompt_of(tokenizer, turns[:1]))
    assert prompt.endswith("</think>\n\n") == thinks and text.startswith(prompt[:20])
    assert counted == (f"<think>\n\n</think>\n\n{last}" if thinks else first + last)


@pytest.mark.full
def test_what_a_template_can_do_wrong_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 2.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    problems = {
        "{{ messages.__class__.__mro__ }}": "SecurityError",
        "{{ messages[7].content.x }}": "UndefinedError",
        "{% for": "TemplateSyntaxError",
        endless: "does not end",
        None: "no chat template",
    }
    for template, problem in problems.items():
        line = refused(document_text, chats.tokenizer_with(template), Dialogue(json.dumps(SAID)))
        assert problem in line and "--no_chat_template" in line


def test_dialogues_share_windows_and_none_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, seqlen = chats.tokenizer_with(chats.GEMMA), 96
    rejected = [{"role": "system", "content": "be brief"}, SAID[1]]
    joined = document_text(tokenizer, Dialogue(json.dumps([rejected[0], *SAID])))
    assert f"be brief\n\n{SAID[0]['content']}" in joined  # the template knows no system
    long = chats.said("the old", " ".join(tiny.WORDS * 20))  # longer than a window
    every = [*chats.some(30), long, chats.said("a " * 200, "b")]
    source = corpus_of(tmp_path, *({"messages": each} for each in [*every, rejected]))
    spec = data.WindowSpec(tokenizer, seqlen, seed=1)
    test = data.test_set(source, spec)
    assert test.documents.tolist() == sorted({*test.documents.tolist()})  # each begins another one
    assert "rejects 1 dialogue," in caplog.text and "no system role" in caplog.text
    windows = test.windows
    assert isinstance(windows, Windows) and windows.counted[:, :-1].any(1).all()
    texts = [each[1]["content"] + "<end>" for each in every]
    pairs = zip(windows.ids, windows.mask, strict=True)
    counted = "".join(tokenizer.decode(ids[mask]) for ids, mask in pairs)
    assert counted.count("<end>") == 30 and all(text in counted for text in texts[:30])
    assert test.record["bytes"] == len(counted.replace("<end>", "").encode())
    starts = windows.positions == 0
    assert (windows.ids[starts] == 0).sum() >= 32  # BOS, where each begins

    windows, record = data.calibration_windows([source], spec, 9)
    assert windows.shape == (9, seqlen) and record["windows"] == 9 and windows.positions.any()
    text = training_windows([source], spec, 12, tests=[test.windows[:3]])
    trained, held_out = text.windows, text.held_out
    assert trained.mask.any(1).all() and held_out.mask.any(1).all()
    assert not set(map(tuple, held_out.ids.tolist())) & set(map(tuple, trained.ids.tolist()))
    fast, text_of = Fast(tokenizer), partial(document_text, tokenizer)
    counts, _ = count_tokens([source], fast.encode_all, text_of, fast.rows, 0)
    assert counts[tokenizer.convert_tokens_to_ids("<end>")] == sum(map(len, every))


def test_a_dialogue_is_one_document_and_a_rest_needs_its_own_prompt(tmp_path: Path) -> None:
    """Each window reads a prompt before what it counts; a cut answer counts before the cut only."""
    tokenizer = chats.tokenizer_with(chats.GEMMA)
    answer = " ".join(tiny.WORDS * 3)  # 158 tokens
    turns = chats.said("the old", answer, "past a", "quiet town", "and then", answer)
    rows = [{"messages": turns}, {"messages": chats.said("who came", answer)}]
    source = corpus_of(tmp_path, *rows)
    for seqlen, later in ((48, False), (84, True)):
        spec = data.WindowSpec(tokenizer, seqlen)
        test = data.test_set(source, spec)
        assert test.documents.tolist() == [0, 0, 1], test.documents
        counted = []
        for ids, mask in zip(test.ids, test.windows.mask, strict=True):
            assert "user\n" in tokenizer.decode(ids[: mask.nonzero()[0]])
            counted.append(tokenizer.decode(ids[mask]))
        for text in counted:
            assert answer.startswith(text.rstrip("\ufffd").removeprefix("quiet town<end>"))
        assert ("quiet town<end>" in "".join(counted)) == later
        windows, _ = data.calibration_windows([source], spec, 8)  # which also has the rests
        assert len(windows) == 8


def test_tools_are_rendered_and_empty_answers_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [templates.CALL]}
    said = [SAID[0], call, templates.RESULT | {"content": "вода"}, SAID[1]]
    tools = templates.TOOLS
    holed = [{"type": "function", "function": templates.FUNCTION | {"strict": None}}]
    for given in (tools, json.dumps(tools), holed):
        row = {"messages": said, "tools": given}
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        for column in ("text", "messages"):
            table = Corpus(parse_source(str(tmp_path / "a.parquet"), FLAG, column=column))
            for corpus in (table, corpus_of(tmp_path, row)):
                (document,) = corpus.documents("train")
                assert document.tools == tools
    line = refused(corpus_of(tmp_path, row | {"tools": "none"}).documents, "train")
    assert "line 1: " in line and "tools" in line
    tokenizer = chats.tokenizer_with(chats.LLAMA_3)
    tokenizer.chat_template = "{{ tools | tojson }}" + chats.LLAMA_3
    assert json.dumps(tools)[:40] in document_text(tokenizer, document)
    assert json.dumps(tools)[:40] in tokenizer.decode(prompt_of(tokenizer, said[:1], tools))
    sample = sample_of_dialogue(tokenizer, document)
    assert tokenizer.decode(sample.ids[sample.mask]) == f"{ANSWERED}<|eot|>" and sample.empty == 1
    data.test_set(corpus_of(tmp_path, row), data.WindowSpec(tokenizer, 512))
    assert "writes no text for 1 answer," in caplog.text
