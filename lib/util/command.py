"""The names of cli, processes and errors, until their users import from there."""
# ruff: noqa: F401

import sys
import time

from .cli import (  # noqa: I001
    CALLED,
    FAILED,
    WAITING,
    Parser,
    add_debug_flag,
    make_parser,
    run,
    split_argv,
    typed,
)
from .errors import describe_error, one_line
from .processes import PACKAGE, ROOT, TURN_SECONDS, call, environment_number, main_of, started_by  # noqa: I001
from .processes import import_own as part

if __name__ == "__main__":
    sys.exit(run(main_of(sys.argv[1]), sys.argv[2:]))
