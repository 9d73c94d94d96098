"""The package's only exception and its only warning. Both have messages of one line."""


class PackedError(ValueError):
    """An invalid file, configuration or matrix.

    The message names the problem and the way out. A command line should print it without a
    traceback.
    """


class PackedWarning(UserWarning):
    """Something works, but not in the fastest way; the message gives the reason."""
