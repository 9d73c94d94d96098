"""python -m lib.compress"""

import sys

from lib.compress.compress import main
from lib.util.command import run

sys.exit(run(main))
