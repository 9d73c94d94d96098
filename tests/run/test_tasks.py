"""--tasks: one line without lm-eval; with it its numbers in results.json, of tasks of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, results
from transformers import AutoModelForCausalLM, AutoTokenizer

import lib.quality.tasks

pytestmark = pytest.mark.usefixtures("elsewhere")


def evaluate(tmp_path: Path, names: str, *more: object):
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    flags = ["--eval_only", "--eval_data", texts, "--tasks", names, *more]
    return call("--model", model, *QUICK, *flags)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.quality.tasks, "find_spec", lambda name: None)
    done = evaluate(tmp_path, "arc_easy")
    assert done.status == 1 and len(done.complaints) == 1
    assert "--tasks arc_easy" in done.complaints[0] and "pip install lm-eval" in done.complaints[0]


BASE = [
    ("сонце тихо пливе", ["над", "старим містом", "the"]),
    ("the old river", ["quiet", "runs", "town"]),
    ("past a quiet", ["town", "ліс", "ріка"]),
    ("ліс", ["тихо", "the", "runs past"]),
]
QUESTIONS = [(context, options, answer) for context, options in BASE for answer in range(3)]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task, and its data."""
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    names = "context", "options", "answer"
    rows = [json.dumps(dict(zip(names, row, strict=True))) for row in QUESTIONS]
    (folder / "choices.jsonl").write_text("\n".join(rows), "utf-8")
    text = TASK.format(name="choices_uk", data=folder / "choices.jsonl")
    (folder / "choices.yaml").write_text(text, "utf-8")
    return folder


@torch.no_grad()
def right_ones(folder: Path) -> int:
    """Questions whose answer is the likeliest, by a forward pass for each option."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = 0
    for context, options, answer in QUESTIONS:
        values = []
        for option in options:
            ids = tokenizer(f"{context} {option}", return_tensors="pt").input_ids
            start = tokenizer(context, return_tensors="pt").input_ids.shape[1]
            log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            values.append(log_p.gather(-1, ids[0, start:, None]).sum().item())
        count += values.index(max(values)) == answer
    return count


def test_a_task_of_ones_own(tmp_path: Path, tasks: Path) -> None:
    done = evaluate(tmp_path, "choices_uk", "--include_path", tasks)
    assert done.status == 0, done.err
    found = results()["tasks"]["choices_uk"]
    assert found["acc,none"] == pytest.approx(right_ones(tmp_path / "model") / len(QUESTIONS))
    assert 0 < found["acc_stderr,none"] < 1


def test_a_folder_that_is_missing(tmp_path: Path, tasks: Path, no_weights: None) -> None:
    done = evaluate(tmp_path, "choices_uk", "--include_path", tmp_path / "nowhere")
    assert done.status == 1 and len(done.complaints) == 1
    assert "nowhere: no such folder; name one with YAML files" in done.complaints[0]


def test_a_folder_without_tasks_is_refused_alone(tmp_path: Path) -> None:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    flags = ["--eval_only", "--eval_data", texts, "--include_path", tmp_path]
    done = call("--model", model, *QUICK, *flags)
    assert done.status == 2 and "--include_path" in done.err and "--tasks" in done.err


def test_numbers_are_recorded(tmp_path: Path, harness: None) -> None:
    assert evaluate(tmp_path, "arc_easy").status == 0
    record = results()
    assert record["tasks"] == {"arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.1}}


def test_an_unknown_task_fails_before_the_model_loads(
    tmp_path: Path, harness: None, no_weights: None
) -> None:
    done = evaluate(tmp_path, "nosuch")
    assert done.status == 1 and "--tasks nosuch" in done.complaints[0]
    done = evaluate(tmp_path, "arc_easy,nosuch", "--include_path", tmp_path)
    problem = f"--tasks nosuch: lm-eval has no such task, nor has {tmp_path}"
    assert done.status == 1 and problem in done.complaints[0]
