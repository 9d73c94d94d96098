"""The one exception that a user sees as a single line."""


class UserError(ValueError):
    """A mistake of the user's or of the outside world, told in one line.

    The message names the flag, the value and the way out; `main.py` prints it without a traceback
    (unless `--debug`) and exits with status 1.
    """
