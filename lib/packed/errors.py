"""The package's one exception and its one warning. Both are a single line."""


class PackedError(ValueError):
    """A file, a configuration or a matrix that is not what it has to be.

    The message names what is wrong and the way out. A command line should print it as it is,
    without a traceback.
    """


class PackedWarning(UserWarning):
    """Something works, but not in the fastest way; the message says why."""
