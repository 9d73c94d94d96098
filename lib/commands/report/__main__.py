"""Write tables and pictures of finished runs, and test which differences are significant.
For researchers; the tables are also written for LaTeX.

    bash launch.sh report RUN [RUN ...] [--against dense] [--latex FILE] [--csv FILE] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder of such folders. Runs of a sweep that are not finished
are named. Tables and pictures go to report.md, unrounded figures to report.csv, differences to
differences.csv. The terminal shows the columns that fit.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...util.cli import make_parser
from ...util.errors import UserError
from ...util.files import check_writable, write_text
from .table import DENSE, Runs, Unfinished, load_runs, row_keys, tables, unfinished

if TYPE_CHECKING:
    from pandas import DataFrame


def main(argv: list[str]) -> None:
    parser = make_parser("report", __doc__)
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    about = "compare every row also with this one: dense, or a run's folder (default: none)"
    parser.add_argument("--against", metavar="RUN", help=about)
    about = "write the tables for LaTeX with booktabs to this file (default: none)"
    parser.add_argument("--latex", metavar="FILE", help=about)
    about = "write a line for each run to this file: its command and all settings (default: none)"
    parser.add_argument("--csv", metavar="FILE", help=about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    for flag in ("latex", "csv"):
        if file := getattr(args, flag):
            check_writable(f"--{flag}", str(Path(file).parent))
    more = [args.against] if args.against not in (None, DENSE) else []
    runs = load_runs([*args.runs, *more])
    missing = unfinished(args.runs)
    print(write_report(runs, missing, Path(args.out), args.against, args.latex, args.csv))
    print(f"wrote {args.out}/report.md, with all columns", file=sys.stderr)


def write_report(
    runs: Runs,
    missing: Unfinished,
    out: Path,
    against: str | None = None,
    latex_file: str | None = None,
    csv_file: str | None = None,
) -> str:
    """Write report.md, report.csv, differences.csv and pictures into `out`; return what is printed.

    `latex_file` gets the tables for LaTeX, `csv_file` all settings of every run. All of them name
    the runs that are not finished, `missing`. Raises UserError if no row is that of `against`.
    """
    from ...run.results import read_losses
    from .statistics import add_intervals, differences, is_named
    from .writing import Compared, all_settings, caption, latex, report_text, write_csv

    losses = {folder: read_losses(folder, results) for folder, results in runs.items()}
    models = []
    for table in tables(runs):
        add_intervals(table, losses)
        models.append(Compared(table, *differences(table, losses, against), caption(table, runs)))
    by_model = [model.table for model in models]
    rows = (row for table in by_model for _, row in table.groupby(row_keys(table)))
    if against and not any(is_named(row, against) for row in rows):
        fix = "Name the folder of a run, or add a RUN"
        raise UserError(f"--against {against}", "no run matches", fix)
    out.mkdir(parents=True, exist_ok=True)
    text = report_text(models, missing.line)
    pictures = _write_pictures(by_model, runs, out)
    write_text(out / "report.md", "\n\n".join([text.strip(), *pictures]) + "\n")
    write_csv(by_model, out / "report.csv", missing.folders)
    of_models = [m.lines.assign(model=m.table["model"].iloc[0]) for m in models if len(m.lines)]
    if of_models:
        write_csv(of_models, out / "differences.csv")
    if latex_file:
        write_text(Path(latex_file), latex(models, missing.line))
    if csv_file:
        write_text(Path(csv_file), all_settings(runs, missing.folders).to_csv(index=False))
    return report_text(models, missing.line, shutil.get_terminal_size().columns)


def _write_pictures(by_model: Sequence[DataFrame], runs: Runs, out: Path) -> Iterator[str]:
    """Write every picture as PNG and PDF; yield the Markdown of each."""
    from matplotlib import rc_context

    from .pictures import curves, layer_errors, picture

    for number, table in enumerate(by_model, 1):
        keys = row_keys(table)
        figures = {"languages": picture(table)} | curves(table, keys)
        figures["errors"] = layer_errors(table, keys, runs)
        for name, figure in figures.items():
            name = f"{name}-{number}" if len(by_model) > 1 else name
            if figure:  # the same figures give the same bytes
                figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})
                with rc_context({"pdf.fonttype": 42}):  # publishers require it
                    figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
                yield f"![{name}]({name}.png)"
