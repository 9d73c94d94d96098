"""python -m lib.report"""

import sys

from lib.report.report import main
from lib.util.command import run

sys.exit(run(main))
