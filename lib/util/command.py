"""The names of cli, processes and errors, until their users import from there."""

import time  # noqa: F401

from .cli import (
    run,
)  # noqa: F401
from .errors import describe_error, one_line  # noqa: F401
from .processes import PACKAGE, ROOT, TURN_SECONDS, call, environment_number, main_of, started_by  # noqa: F401
from .processes import import_own as part  # noqa: F401

if __name__ == "__main__":
    import sys

    sys.exit(run(main_of(sys.argv[1]), sys.argv[2:]))
