"""Run tasks of lm-eval: its own, and those of a folder, such as lib/commands/tasks.py writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..util.errors import UserError, describe_error, first_line, one_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Figures = Mapping[str, Mapping[str, float | str]]  # {task: {metric: value}}
RIGHT = "right"  # key of a task's figures: 1 for each question answered right, else 0


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Raise UserError if lm-eval is not installed or lacks a task, before anything slow."""
    given = ",".join(names)
    if find_spec("lm_eval") is None:
        fix = 'Run pip install "lm-eval[hf]"'
        raise UserError(f"--tasks {given}", "lm-eval is not installed", fix)
    if include_path and not Path(include_path).is_dir():
        what = f"--include_path {include_path}"
        raise UserError(what, "no such folder exists", "Name another")
    manager = _manager(tuple(names), include_path)
    for name in names:
        if not manager.match_tasks([name]) and not Path(name).is_file():
            where = f" and {include_path}" if include_path else ""
            problem = f"no such task is in lm-eval{where}"
            raise UserError(f"--tasks {name}", problem, "Run `lm-eval ls tasks`")


def run_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], batch_size: int, include_path: str | None
) -> Figures:
    """Return {task: {metric: value}} of the model in memory, as the tasks define them.

    The metrics are lm-eval's, such as `acc,none` and its standard error, `acc_stderr,none`. RIGHT
    has a digit for each question, in their order, if answers are right or wrong. Raises UserError
    if a task fails with any error of its code or data.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    evaluator.get_git_commit_hash = lambda: None  # git complains outside a checkout
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=_manager(tuple(names), include_path),
        )
    except Exception as error:
        reason = describe_error(error) or f"{type(error).__name__}: {first_line(error)}"
        fix = "All other results and the model are saved"
        raise UserError(f"--tasks {','.join(names)}", reason, fix) from error
    figures: dict[str, dict[str, float | str]] = {}
    for task, metrics in found["results"].items():
        numbers = ((name, metrics[name]) for name in metrics if "," in name)
        figures[task] = {name: float(one) for name, one in numbers if isinstance(one, int | float)}
        samples = found["samples"].get(task, ())
        right = {one["doc_id"]: one.get("acc", one.get("exact_match")) for one in samples}
        if right and len(right) == len(samples) and all(one in (0, 1) for one in right.values()):
            figures[task][RIGHT] = "".join(str(int(right[number])) for number in sorted(right))
    return figures


@cache
def _manager(names: tuple[str, ...], include_path: str | None) -> TaskManager:
    """Return the folder's tasks if `names` are among them, else lm-eval's thousands too."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    return TaskManager(include_path=include_path, include_defaults=True)


def task_lines(tasks: Figures, dense: Figures | None = None) -> Iterator[str]:
    """Yield a line for each figure with its 95% interval, and the dense model's if given."""
    for task, metrics in tasks.items():
        before = (dense or {}).get(task, {})
        paired = RIGHT in metrics and RIGHT in before
        pair = f"; {mcnemar(before[RIGHT], metrics[RIGHT])}" if paired else ""
        for metric in (name for name in metrics if "_stderr" not in name and name != RIGHT):
            line = f"{one_line(task)}, {metric.split(',')[0]}: {_figure(metrics, metric)}"
            yield line + (f" (dense {_figure(before, metric)}{pair})" if metric in before else "")


def mcnemar(dense: str, model: str) -> str:
    """Compare answers to the same questions (RIGHT): McNemar's exact test."""
    lost, won = (sum(map(str.__gt__, *pair)) for pair in ((dense, model), (model, dense)))
    n, least = lost + won, min(lost, won)
    p = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
    return f"{lost} lost, {won} won, p {p:.2g}"


def _figure(metrics: Mapping[str, float], metric: str) -> str:
    error = metrics.get(metric.replace(",", "_stderr,"))
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")
