"""Chat templates that write the date: a run has one, on whatever day it is continued."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import chats
import pytest
import tiny
from support import QUICK, call, call_here, raising, results, succeed, weights

from lib.commands.compress import __main__ as compress
from lib.commands.sweep import __main__ as sweep
from lib.data import templates
from lib.data.templates import rendered, set_date
from lib.run import check
from lib.run.flags import build_parser
from lib.vocabulary.tokenizer_json import TrimmableTokenizer

pytestmark = pytest.mark.usefixtures("elsewhere")
PRUNE = ["--model", "m", "--calibration_data", "said", "--eval_data", "said", *QUICK]
PRUNE += ["--prune_method", "wanda"]
FIRST, LATER = "2026-11-29", "2027-01-05"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`on(day)` sets the clock."""
    monkeypatch.setattr(templates, "_date", str(date.today()))  # what a run sets ends with the test

    def clock(day: str) -> None:
        today = SimpleNamespace(today=lambda: date.fromisoformat(day))
        for module in (check, sweep):
            monkeypatch.setattr(module, "date", today)

    return clock


def write(template: str = chats.DATED) -> None:
    tiny.write_model("m", tokenizer=chats.tokenizer_with(template))
    chats.write(Path("said"), chats.some(120), chats.some(12, 1))


def test_a_template_writes_the_date_of_the_run_and_its_tokens_stay(on: Callable) -> None:
    tokenizer, said = chats.tokenizer_with(chats.DATED), chats.said("a", "b")
    as_others_do = tokenizer.apply_chat_template(said, tokenize=False)
    assert rendered(tokenizer, said)[0] == as_others_do  # today's, where nobody sets it
    kept = []
    for day, words in {FIRST: "Sunday 29 November 2026", LATER: "Tuesday 05"}.items():
        set_date(day)
        text, spans = rendered(tokenizer, said)
        assert text.startswith(f"<s>{words}") and [text[a:b] for a, b in spans] == ["b<|eot|>"]
        kept.append(TrimmableTokenizer(tokenizer, "m").template_ids())
    assert kept[0] == kept[1]
    for day in ("2027-01-31", "2031-09-12", "2026-05-07"):
        set_date(day)
        assert kept[0].issuperset(tokenizer(rendered(tokenizer, said[:1])[0]).input_ids)


@pytest.mark.full
def test_a_run_that_is_continued_on_another_day(on: Callable) -> None:
    write()

    def to(name: str) -> list:
        return [*PRUNE, "--seqlen", 64, "--save", f"{name}-out", "--save_model", name]

    resumed = [*to("resumed"), "--resume", "kept"]
    on(FIRST)
    with raising(MemoryError("none left"), "prune", 1):
        assert call(*resumed).status == 1
    on(LATER)
    other = call(*resumed, "--date", LATER)
    assert other.status == 1 and f"'{FIRST}', not '{LATER}'" in other.err
    assert "finished before: 1 of" in succeed(*resumed).out
    succeed(*to("today"))
    succeed(*to("same"), "--date", FIRST.replace("-", ""))
    first, today, same = (results(f"{name}-out") for name in ("resumed", "today", "same"))
    assert first["date"] == first["flags"]["date"] == same["date"] == FIRST
    for found in (lambda it: it["calibration"]["digest"], lambda it: it["evaluation"][0]["digest"]):
        assert found(first) == found(same) != found(today)
    again = weights("same")
    assert all(tensor.equal(again[name]) for name, tensor in weights("resumed").items())
    assert f"--date {FIRST}" in Path("resumed/README.md").read_text("utf-8")


def test_where_no_template_asks_the_date_does_not_count(on: Callable) -> None:
    write(chats.LLAMA_3)
    prints = []
    for day, flags in ((FIRST, []), (LATER, []), (LATER, ["--date", LATER])):
        on(day)
        succeed(*PRUNE, "--save", "out", *flags)
        prints.append(results()["fingerprint"])
        assert flags or results()["date"] is None
    assert prints[0] == prints[1] == prints[2]
    assert call(*PRUNE, "--date", "today").status == 2


@pytest.mark.full
def test_a_sweep_that_goes_on_on_another_day(on: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setattr(sweep, "call", call_here)
    argv = ["--models", "m", "--methods", "magnitude", "--types", "unstructured"]
    argv += ["--eval_data", "said", "--out", "runs", "--ratios", "0.5"]
    on(FIRST)
    succeed(*argv, "--", *QUICK, "--seqlen", 64, program=sweep.main)
    on(LATER)
    done = succeed(*argv, "0.6", "--", *QUICK, "--seqlen", 64, program=sweep.main)
    assert done.out.count("finished before") == 2
    assert results("runs/m/magnitude-60")["date"] == FIRST


@pytest.mark.full
def test_a_compression_that_goes_on_on_another_day(
    on: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    argv, began = "m small --data said --device cpu".split(), []

    def begin(module: str, *argv: object) -> int:
        began.append([module, *argv])
        return 1 if module == "main" else 3  # killed in its main run, of the whole vocabulary

    monkeypatch.setattr("lib.util.processes.call", begin)
    for day in (FIRST, LATER):
        on(day)
        assert call(*argv, program=compress.main).status == 1
    made = [words[words.index("--date") + 1] for words in began if words[0] == "main"]
    assert made == [FIRST, FIRST]


def test_ranks_take_the_date_of_the_first(on: Callable) -> None:
    on(LATER)
    flags = build_parser().parse_args(["--model", "m"])
    dist = SimpleNamespace(all_gather_object=lambda day: ["2027-01-04", day])
    check._set_date(flags, chats.tokenizer_with(chats.DATED), dist)
    assert flags.date == templates._date == "2027-01-04"
