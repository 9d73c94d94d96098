"""A package with lm-eval's names that knows two tasks: lm-eval itself wants the hub."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator

import pytest

import lib.quality.tasks


def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the package in place of lm-eval, whether that is installed or not."""

    class TaskManager:
        def __init__(self, include_path: str | None, include_defaults: bool = True) -> None:
            self.all = include_defaults

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in ("arc", "arc_easy") and self.all]

    def simple_evaluate(model, tasks: list[str], task_manager: TaskManager) -> dict:
        metrics = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1}
        return {"results": {task: metrics for task in tasks}}

    top, sub = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    models, hf = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    top.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    top.simple_evaluate, sub.TaskManager = simple_evaluate, TaskManager
    hf.HFLM = lambda **given: given
    for module in (top, sub, models, hf):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    forget()
    yield
    forget()


def forget() -> None:
    """The tasks that are known, of lm-eval or of what takes its place."""
    lib.quality.tasks._read_tasks.cache_clear()
