"""The steps of a run that follow pruning: one that fails does not keep the next from being done.

steps = Steps()
with steps.attempt("--tasks arc"):
    ...                                # whatever is raised here is kept
steps.raise_failures("the model is saved in OUT")
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lib.util.command import describe_error
from lib.util.errors import UserError


class Steps:
    """Steps that are attempted one after another, and what has failed of them."""

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
        """Raise UserError in one line if a step has failed; `done`: what is there all the same."""
        if self.failures:
            reasons = [_reason(name, error) for name, error in self.failures]
            line = "; ".join([*reasons, *([done] if done else [])])
            raise UserError(line) from self.failures[0][1]


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)  # it names its flag
    text = " ".join(str(error).split())
    return f"{name}: failed ({type(error).__name__}: {text})"
