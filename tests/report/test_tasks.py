"""Tasks for lm-eval: fair questions of a text, and lm-eval's own figures for them."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import chats
import pytest
import tiny
import torch
from approval import Words
from processes import ended, together
from support import QUICK, mistake, results, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.commands import tasks
from lib.commands.tasks import WORD, last_words, main
from lib.run.lm_eval import RIGHT, check_tasks, task_lines
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

WORDS = "місто річка дерево сонце вікно книга дорога пташка хмара камінь зірка листя".split()


def document(seed: int, sentences: int = 12) -> str:
    draw = random.Random(seed)
    rows = [" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(sentences)]
    return " ".join(rows[:6]) + "\n" + " ".join(rows[6:])


TEXTS = [document(seed) for seed in range(30)]


def test_last_words_are_among_words_of_their_kind() -> None:
    questions = last_words(TEXTS, 0)
    counts = Counter(w for text in TEXTS for w in re.findall(WORD, text) if w.islower())
    assert len(questions) > 100
    for question in questions:
        words, right = question["options"], question["options"][question["answer"]]
        assert len(set(words)) == 4 and len({len(word) for word in words}) == 1
        assert len({counts[word].bit_length() for word in words}) == 1
        assert any(f"{question['context']} {right}." in text for text in TEXTS)
        assert tasks.LEAST_CONTEXT <= len(question["context"]) <= tasks.CONTEXT
    places = Counter(question["answer"] for question in questions)
    assert min(places.values()) > len(questions) / 8 and len(places) == 4
    assert last_words(TEXTS, 0) == questions != last_words(TEXTS, 1)


@pytest.mark.parametrize("tag", ["uk", "en", "hi"])
def test_currencies_are_those_of_the_countries(tag: str) -> None:
    babel = pytest.importorskip("babel")
    from babel.numbers import get_territory_currencies

    locale, questions = babel.Locale(tag), tasks.currencies(tag, 0)
    codes = {name: code for code, name in locale.territories.items() if code.isalpha()}

    def is_of(word: str, place: str) -> bool:
        used = get_territory_currencies(codes[place], tasks.FIXED)
        return word in locale.currencies[used[0]].lower()

    for question in questions:
        *shown, asked = question["context"].split("; ")
        place, right = asked.removesuffix(" —"), question["options"][question["answer"]]
        assert is_of(right, place) and not place.lower().startswith(right[:3])
        assert len(shown) == 3 and all(is_of(*each.split(" — ")[::-1]) for each in shown)
        assert len(set(question["options"])) == 4 and f"— {right};" not in question["context"]
    answers = Counter(each["options"][each["answer"]] for each in questions)
    assert len(questions) == 100 and max(answers.values()) <= tasks.ALIKE
    assert tasks.currencies(tag, 0) == questions != tasks.currencies(tag, 1)


def test_currencies_of_any_language_have_names_or_are_not_asked() -> None:
    pytest.importorskip("babel")
    from babel.localedata import locale_identifiers

    for tag in ["nonsense", *(name for name in locale_identifiers() if "_" not in name)]:
        for question in tasks.currencies(tag, 0):
            assert all(question["options"]) and len({*question["options"]}) == 4, tag
    assert tasks.currencies("nonsense", 0) == tasks.currencies("wal", 0) == []
    assert tasks.currencies("pt_BR", 0) == tasks.currencies("pt-BR", 0) != []


def test_words_of_a_chat_model_are_asked_for_after_all_that_was_said(tmp_path: Path) -> None:
    tokenizer = chats.tokenizer_with(chats.GEMMA)
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [chats.said(f"{document(n)} {document(n + 99)}", document(n + 30)) for n in range(20)]
    chats.write(tmp_path / "chat", [], turns)
    argv = [str(tmp_path / "chat"), str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    succeed(*argv, program=main)
    questions, asked = read(tmp_path / "out/chat_last_word.jsonl"), "<start>user\n"
    assert len(questions) > 20
    for question in questions:
        context, right = question["context"], question["options"][question["answer"]]
        (whole,) = (t for t in turns if context.startswith(f"<s>{asked}{t[0]['content']}<end>"))
        said = context.partition("<start>model\n")[2]
        assert said and whole[1]["content"].startswith(f"{said} {right}.")


def sentence(number: int) -> str:
    """Words of tiny's texts, then in turn one of four that are as long and as frequent."""
    words = random.Random(number).choices("сонце ріка тихо пливе".split(), k=14)
    return " ".join([*words, "міст ліси тихе село".split()[number % 4]]) + "."


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A tiny model, its texts, and tasks made of them by the command."""
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    tiny.write_model(tmp_path / "model")
    tiny.write_texts(tmp_path / "uk")
    data = tiny.write_texts(tmp_path / "words", 1, map(sentence, range(40)))
    pairs = [{"good": f"ріка пливе {i}", "bad": f"пливе ріка {i}"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    main([str(data), str(tmp_path / "tasks"), "--language", "uk", "--pairs", "pairs.jsonl"])
    return tmp_path


def of_tasks(place: Path, names: str, *more: object) -> list[object]:
    """The command line of a run that evaluates these tasks."""
    flags = ["--calibration_data", place / "uk", "--prune_method", "wanda", "--save_model", "new"]
    flags += ["--save", "out", "--tasks", names, *more]
    return ["--model", place / "model", *QUICK, *flags]


@torch.no_grad()
def chosen(folder: Path, questions: list[dict], before: str) -> float:
    """Share of questions whose answer is the likeliest, by a forward pass for each option."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, right = AutoTokenizer.from_pretrained(folder), 0
    for question in questions:
        context, values = question.get("context", ""), []
        for option in question["options"]:
            start = tokenizer(context, return_tensors="pt").input_ids.shape[1]
            ids = tokenizer(context + before + option, return_tensors="pt").input_ids
            log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            values.append(log_p.gather(-1, ids[0, start:, None]).sum().item())
        right += values.index(max(values)) == question["answer"]
    return right / len(questions)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.full
def test_lm_eval_runs_the_tasks_on_both_models_offline(place: Path) -> None:
    names = ("uk_last_word", "uk_last_word_said", "uk_pairs")
    done = succeed(*of_tasks(place, ",".join(names), "--include_path", place / "tasks"))
    for key, folder in {"tasks": Path("new"), "dense_tasks": place / "model"}.items():
        found = results()[key]
        assert set(found) == set(names)
        for name, before in (("uk_last_word", " "), ("uk_pairs", "")):
            questions = read(place / "tasks" / f"{name}.jsonl")
            expected = chosen(folder, questions, before)
            assert found[name]["acc,none"] == pytest.approx(expected)
            assert found[name]["acc_stderr,none"] >= 0
            right = found[name][RIGHT]
            assert right.count("1") / len(questions) == pytest.approx(expected)
        said = {"exact_match,first_word": 0.0, "exact_match_stderr,first_word": 0.0}
        said[RIGHT] = "0" * 40
        assert found["uk_last_word_said"] == said  # the model is random
    assert "uk_last_word, acc: 0." in done.out and " (dense 0." in done.out


@pytest.mark.full
def test_the_first_of_two_ranks_runs_them_once_both_have_trained(place: Path) -> None:
    names = ["--tasks", "uk_pairs", "--include_path", "tasks"]
    flags = ["--model", "model", *QUICK, "--calibration_data", "uk", "--prune_method", "wanda"]
    flags += ["--recover", "512", "--save_model", "new", "--save", "out", *names]
    done = ended(together(2, [flags], place))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert "recovery: 2 ranks share the trained weights" in done[0].out and not done[1].out
    assert done[0].out.count("uk_pairs, acc: ") == 1
    found, argv = results(), ["--eval_only", "--eval_data", "uk", *QUICK, *names]
    for key, folder in {"tasks": "new", "dense_tasks": "model"}.items():
        succeed("--model", folder, *argv, "--save", key)
        assert results(key)["tasks"] == found[key]


@pytest.mark.full
def test_a_word_that_is_written_counts(place: Path) -> None:
    """A model that writes the answer to half of the contexts, and goes on after it."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    questions = read(place / "tasks" / "uk_last_word_said.jsonl")
    answers = {q["context"]: q["options"][q["answer"]] for q in questions}
    known = list(answers)[: len(answers) // 2]

    class Writer(LM):
        def generate_until(self, requests):
            contexts = [request.args[0] for request in requests]
            return [f" {answers[c]} і ще" if c in known else f" {answers[c]}а" for c in contexts]

        def loglikelihood(self, requests): ...

        def loglikelihood_rolling(self, requests): ...

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = simple_evaluate(model=Writer(), tasks=["uk_last_word_said"], task_manager=manager)
    share = found["results"]["uk_last_word_said"]["exact_match,first_word"]
    right = sum(question["context"] in known for question in questions) / len(questions)
    assert share == pytest.approx(right) and 0 < share < 1


def test_lines_have_intervals_and_the_dense_models_figures(words: Words) -> None:
    tasks = {"uk": {"acc,none": 0.5, "acc_stderr,none": 0.1, "words,none": 3.0}}
    dense = {"uk": {"acc,none": 0.6, "acc_stderr,none": 0.1}}
    said = [*task_lines(tasks, dense), *task_lines(tasks)]
    tasks["uk"][RIGHT], dense["uk"][RIGHT] = "0001100000", "0111011111"  # p is 2 (1 + 8) / 2^8
    words("report.txt", "\n".join([*said, *task_lines(tasks, dense)]), "figures of tasks")


def test_a_task_that_fails_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise KeyError("answer")

    monkeypatch.setattr("lm_eval.simple_evaluate", fail)
    error = mistake(*of_tasks(place, "uk_pairs", "--include_path", place / "tasks"))
    assert str(error).startswith("--tasks uk_pairs: ") and results()["perplexity"]


def test_what_is_missing_is_refused_before_the_model_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    from lm_eval.tasks import TaskManager

    few = partial(TaskManager, include_defaults=False)  # all are thousands of files
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path, **_: few(include_path=include_path)
    )
    for names, folder, what in (
        ("uk_pairs", "nowhere", f"--include_path {place / 'nowhere'}"),
        ("uk_pairs,nosuch", "tasks", "--tasks nosuch"),
    ):
        error = mistake(*of_tasks(place, names, "--include_path", place / folder))
        assert str(error).startswith(f"{what}: ")


def test_lm_eval_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models of transformers are an extra of the package."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=re.escape('pip install "lm-eval[hf]"')):
        check_tasks(["uk_last_word"])
