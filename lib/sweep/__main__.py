"""python -m lib.sweep"""

import sys

from lib.sweep.sweep import main
from lib.util.command import run

sys.exit(run(main))
