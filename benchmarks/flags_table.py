"""Write the flag reference in docs/usage.md from the parsers of main.py and compress.

    python benchmarks/flags_table.py            # rewrite the tables
    python benchmarks/flags_table.py --check    # write nothing; fail if one is stale

A table stands between two lines, `<!-- flags: COMMAND -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.commands.compress import __main__ as compress  # noqa: E402
from lib.run.flags import build_parser  # noqa: E402
from lib.util.cli import make_parser, run  # noqa: E402
from lib.util.errors import UserError  # noqa: E402

PAGE = ROOT / "docs/usage.md"
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "main.py": build_parser,
    "compress": compress._parser,
}
MARKED = re.compile(r"<!-- flags: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def table(parser: argparse.ArgumentParser) -> str:
    """Return a table of a parser's flags, with a row for the name of each group."""
    rows = ["| Flag | What it does |", "|---|---|"]
    for group in parser._action_groups:
        actions = [each for each in group._group_actions if each.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            rows.append(f"| **{group.title}** | |")
        rows += [row(action) for action in actions]
    return "\n".join(rows)


def row(action: argparse.Action) -> str:
    """Return the row of one flag: its name, its value, its help."""
    name = action.option_strings[-1] if action.option_strings else ""
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else None)
    if action.nargs != 0:
        value = value or action.dest.upper()
        name = f"{name} {value}{' ...' if action.nargs == '+' else ''}".strip()
    about = (action.help or "") % vars(action)
    return f"| `{name}` | {about} |".replace("\n", " ")


def main(argv: list[str]) -> None:
    parser = make_parser("flags_table", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    args = parser.parse_args(argv)
    old = PAGE.read_text("utf-8")
    new = MARKED.sub(
        lambda at: f"<!-- flags: {at[1]} -->\n{table(PARSERS[at[1]]())}\n<!-- end -->", old
    )
    if new != old and args.check:
        raise UserError("docs/usage.md", "it is stale", "Run python benchmarks/flags_table.py")
    if new != old:
        PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
