"""--tasks: one line without lm-eval; with it (a stand-in here), its numbers in results.json."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
import tiny
from support import QUICK, call, results

import lib.eval

pytestmark = pytest.mark.usefixtures("elsewhere")


def evaluate(tmp_path: Path, names: str):
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    flags = ["--eval_only", "--eval_data", texts, "--tasks", names]
    return call("--model", model, *QUICK, *flags)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.eval, "find_spec", lambda name: None)
    done = evaluate(tmp_path, "arc_easy")
    assert done.status == 1 and len(done.complaints) == 1
    assert "--tasks arc_easy" in done.complaints[0] and "pip install lm-eval" in done.complaints[0]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with lm-eval's names that knows one task."""

    class TaskManager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(model, tasks: list[str]) -> dict:
        metrics = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1}
        return {"results": {task: metrics for task in tasks}}

    top, sub = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    models, hf = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    top.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    top.simple_evaluate, sub.TaskManager = simple_evaluate, TaskManager
    hf.HFLM = lambda **given: given
    for module in (top, sub, models, hf):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_numbers_are_recorded(tmp_path: Path, harness: None) -> None:
    assert evaluate(tmp_path, "arc_easy").status == 0
    record = results()
    assert record["tasks"] == {"arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.1}}


def test_an_unknown_task_fails_before_the_model_loads(
    tmp_path: Path, harness: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lib.model.pretrained.load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    done = evaluate(tmp_path, "nosuch")
    assert done.status == 1 and "--tasks nosuch" in done.complaints[0]
