"""The exception that a user sees as a single line, and a warning about the run as a whole."""


class UserError(ValueError):
    """A mistake of the user or a fault of the environment, reported in one line.

    The message names the flag, the value and the way out; `main.py` prints it without a traceback
    (unless `--debug`) and exits with status 1.
    """


class RunWarning(UserWarning):
    """Concerns the whole run, not the linears that are being pruned when it is raised."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without final punctuation, or its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:, ")[:300]
