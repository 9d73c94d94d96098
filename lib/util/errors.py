"""The exception that a user sees as a single line, and a warning about the run as a whole."""


class UserError(ValueError):
    """A mistake of the user or a fault of the environment, reported in one line.

    The message names the flag, the value and the way out; `main.py` prints it without a traceback
    (unless `--debug`) and exits with status 1.
    """


class RunWarning(UserWarning):
    """Concerns the whole run, not the linears that are being pruned when it is raised."""
