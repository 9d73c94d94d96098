"""Beyond perplexity: tasks of EleutherAI's lm-evaluation-harness, if it is installed.

pip install lm-eval
python main.py ... --tasks arc_easy,hellaswag
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.errors import UserError


def check_tasks(names: Sequence[str]) -> None:
    """UserError where lm-eval is not installed or lacks a task; before anything slow."""
    given = ",".join(names)
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {given}: lm-eval is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for name in names:
        if not known.match_tasks([name]) and not Path(name).is_file():
            raise UserError(
                f"--tasks {name}: lm-eval has no such task; `lm-eval ls tasks` lists all"
            )


def run_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], batch_size: int
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model in memory, zero-shot as the tasks define it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=list(names))["results"]
    return {
        task: {
            metric: value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in found.items()
    }
