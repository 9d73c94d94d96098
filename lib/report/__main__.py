"""One table over many runs, and the pictures that go with it.

    python -m lib.report RUN [RUN ...] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder that holds such folders. The table goes to the
terminal and to report.md, with unrounded figures to report.csv; the pictures are beside them.
Completions are in report.md alone.
"""

from __future__ import annotations

import argparse
import sys

from lib.report.results import load_runs
from lib.report.write import report_text, write_report
from lib.util import command
from lib.util.files import check_output_folder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    runs = load_runs(args.runs)
    check_output_folder("--out", args.out)
    for path in write_report(runs, args.out):
        print(f"wrote {path}", file=sys.stderr)
    print(report_text(runs))


if __name__ == "__main__":
    sys.exit(command.run(main))
