"""Rows of chat sets become dialogues, rendered by the model's own template, with a mask."""

import json

import chats
import pyarrow
import pytest
import tiny
import torch
from pyarrow import parquet

from lib.data import templates
from lib.data import windows as data
from lib.data.chats import Dialogue
from lib.data.documents import Corpus
from lib.data.samples import Windows
from lib.data.sources import parse_source
from lib.data.templates import document_text, prompt_of, sample_of_dialogue
from lib.data.training import training_windows
from lib.distributed.context import DistContext
from lib.util.errors import UserError
from lib.vocabulary import count_tokens

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


def source_of(folder, *rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return parse_source(str(folder / name), FLAG)


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "-".join(row))
def test_shapes(tmp_path, row):
    expected = json.loads(json.dumps(SAID))
    if row.get("input"):
        expected[0]["content"] = "Де тече\n\nріка?"
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for source in (source_of(tmp_path, row), parse_source(str(tmp_path / "a.parquet"), FLAG)):
        (document,) = Corpus(source).documents("train")
        assert document.messages == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"words": "a"}, "or give dialogues: messages or conversation (role, content), "),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator' is not one of"),
        ({"messages": ["a"]}, "the role None is not one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "the role ['user'] is not one of"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "the content ['a'] is not text. Write",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": 5}]}]},
            "5}] is not text. Write a tex",
        ),
    ],
)
def test_other_rows_are_refused(tmp_path, row, problem):
    with pytest.raises(UserError) as caught:
        Corpus(source_of(tmp_path, {"messages": SAID}, row)).documents("train")
    assert f"{tmp_path}/rows.jsonl, line 2: " in str(caught.value) and problem in str(caught.value)


def test_rows_without_words_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"messages": SAID}, {"messages": chats.said("a", " ")}, {"messages": []}]
    assert len(Corpus(source_of(tmp_path, *rows)).documents("train")) == 1
    assert "2 rows without" in caplog.text


@pytest.mark.parametrize("template", chats.MARKS, ids="llama gemma qwen mistral".split())
def test_the_mask_is_on_answers_and_their_end(template):
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


def test_what_a_template_can_do_wrong_is_a_line(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 2.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    problems = {
        "{{ messages.__class__.__mro__ }}": "its chat template fails (SecurityError",
        "{{ messages[7].content.x }}": "its chat template fails (UndefinedError",
        "{% for": "its chat template fails (TemplateSyntaxError",
        endless: "its chat template does not end",
        None: "has no chat template",
    }
    for template, problem in problems.items():
        tokenizer = chats.tokenizer_with(template)
        with pytest.raises(UserError) as caught:
            document_text(tokenizer, Dialogue(json.dumps(SAID)))
        assert problem in str(caught.value) and "\n" not in str(caught.value)
        assert "--no_chat_template" in str(caught.value)


def test_dialogues_share_windows_and_none_is_lost(tmp_path, caplog):
    tokenizer, seqlen = chats.tokenizer_with(chats.GEMMA), 96
    refused = [{"role": "system", "content": "be brief"}, SAID[1]]
    joined = document_text(tokenizer, Dialogue(json.dumps([refused[0], *SAID])))
    assert f"be brief\n\n{SAID[0]['content']}" in joined  # the template knows no system
    long = chats.said("the old", " ".join(tiny.WORDS * 20))  # longer than a window
    every = [*chats.some(30), long, chats.said("a " * 200, "b")]
    source = Corpus(source_of(tmp_path, *({"messages": each} for each in [*every, refused])))
    spec = data.WindowSpec(tokenizer, seqlen, seed=1)
    test = data.test_set(source, spec)
    assert "rejects 1 dialogues" in caplog.text and "no system role" in caplog.text
    windows = test.windows
    assert isinstance(windows, Windows) and windows.counted[:, :-1].any(1).all()
    texts = [each[1]["content"] + "<end>" for each in every]
    counted = "".join(
        tokenizer.decode(i[m]) for i, m in zip(windows.ids, windows.mask, strict=True)
    )
    assert counted.count("<end>") == len(texts) and all(text in counted for text in texts[:30])
    assert abs(test.record["bytes"] - len("".join(texts).encode())) < 8 * len(windows)
    starts = windows.positions == 0
    assert (windows.ids[starts] == 0).sum() >= 32  # BOS, where each begins

    windows, record = data.calibration_windows([source], spec, 9)
    assert windows.shape == (9, seqlen) and record["windows"] == 9 and windows.positions.any()
    text = training_windows([source], spec, 12, tests=[test.windows[:3]])
    trained, held_out = text.windows, text.held_out
    assert trained.mask.any(1).all() and held_out.mask.any(1).all()
    assert not set(map(tuple, held_out.ids.tolist())) & set(map(tuple, trained.ids.tolist()))
    counts, _ = count_tokens([source], tokenizer, DistContext(torch.device("cpu"), alone=True))
    assert counts[tokenizer.convert_tokens_to_ids("<end>")] == sum(map(len, every))
