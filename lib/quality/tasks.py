"""Tasks of lm-eval: the built-in ones, and those of a folder, which need no hub.

A task is a YAML file. With your own data, in JSON lines beside it:

    task: choices_uk
    dataset_path: json
    dataset_kwargs: {data_files: {test: /path/choices.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{context}}"
    doc_to_choice: "{{options}}"
    doc_to_target: 0
    metric_list: [{metric: acc}]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.util.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Raise UserError if lm-eval is not installed or lacks a task, before anything slow."""
    given = ",".join(names)
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {given}: lm-eval is not installed; pip install lm-eval")
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such folder; name one with YAML files")
    manager = _manager(names, include_path)
    for name in names:
        if not manager.match_tasks([name]) and not Path(name).is_file():
            where = f", nor has {include_path}" if include_path else ""
            raise UserError(
                f"--tasks {name}: lm-eval has no such task{where}; `lm-eval ls tasks` lists all"
            )


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    batch_size: int,
    include_path: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} of the model in memory, zero-shot as the tasks define it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=_manager(names, include_path),
    )["results"]
    return {
        task: {
            metric: value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in results.items()
    }


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Return a manager of the folder's tasks alone if it has all `names`, else of all tasks."""
    if include_path is not None:
        manager = _tasks_of(include_path)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    return _all_tasks(include_path)


@cache
def _tasks_of(include_path: str) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


@cache
def _all_tasks(include_path: str | None) -> TaskManager:
    """Return a manager of all tasks; it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)
