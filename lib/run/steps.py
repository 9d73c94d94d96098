"""The steps of a run after pruning; one that fails does not stop the steps after it.

steps = Steps()
with steps.attempt("--tasks arc"):
    ...                                # an error raised here is kept for later
steps.raise_failures("the model is saved in OUT")
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lib.util.command import describe_error
from lib.util.errors import UserError


class Steps:
    """Collects the failures of steps that are attempted one after another."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, Exception]] = []  # name of the step, why it failed

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Keep an error that is raised inside, under the name of the step.

        An error that is a defect of the program, not the outside world's, shows its traceback.
        """
        try:
            yield
        except Exception as error:
            self.failures.append((name, error))
            if describe_error(error) is None:
                traceback.print_exc()

    def raise_failures(self, done: str | None = None) -> None:
        """Raise UserError in one line if a step has failed; `done` says what was saved anyway."""
        if self.failures:
            reasons = [_reason(name, error) for name, error in self.failures]
            line = "; ".join([*reasons, *([done] if done else [])])
            raise UserError(line) from self.failures[0][1]


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)  # it names its flag
    text = " ".join(str(error).split())
    return f"{name}: failed ({type(error).__name__}: {text})"
