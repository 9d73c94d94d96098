"""The one exception that a user sees as a single line, and the warning that is nobody's."""


class UserError(ValueError):
    """A mistake of the user's or of the outside world, told in one line.

    The message names the flag, the value and the way out; `main.py` prints it without a traceback
    (unless `--debug`) and exits with status 1.
    """


class RunWarning(UserWarning):
    """Of the run as a whole, not of the linears that are worked on when it comes up."""
