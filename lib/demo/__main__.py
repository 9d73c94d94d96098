"""python -m lib.demo"""

import sys

from lib.demo.demo import main
from lib.util.command import run

sys.exit(run(main))
