"""Build the published calibration and test texts from the five raw dumps of UberText 2.0.

    python -m lib.ubertext FOLDER_OF_DUMPS OUT [--push REPO]

Of each genre, the first 1,000 documents longer than 8,192 characters become OUT/train.jsonl, the
next 50 OUT/test.jsonl; OUT then serves as --calibration_data. Dumps are read as streams, bz2 or
plain. Genres that are finished are kept in OUT.partial, where an interrupted build goes on. The
flags make the same of any other corpus. As in the published builder a length is counted before
white space is folded. Dumps: https://lang.org.ua/en/ubertext/ (Chaplynskyi, UNLP 2023).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from lib import command
from lib.corpus import Recipe, build, find_dumps
from lib.push import check_login, push

GENRES = ("court", "fiction", "news", "social", "wiki")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def parser() -> argparse.ArgumentParser:
    """The command's flags; the only place where their defaults stand."""
    found = argparse.ArgumentParser(
        prog="python -m lib.ubertext",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    found.add_argument("dumps", metavar="FOLDER_OF_DUMPS", help="folder with a file for each genre")
    found.add_argument("out", metavar="OUT", help="new folder for train.jsonl and test.jsonl")
    found.add_argument(
        "--genres",
        nargs="+",
        default=GENRES,
        metavar="GENRE",
        help="words, each found in the name of one dump; '*' makes every file a genre of its own "
        f"(default: {' '.join(GENRES)})",
    )
    found.add_argument(
        "--divider",
        default="3",
        help="what stands between two documents: so many blank lines in a row, or a line's text "
        "(default: %(default)s)",
    )
    found.add_argument(
        "--published_divider",
        action="store_true",
        help="count blank lines as the published builder did: they add up within a document, "
        "also where they are not in a row",
    )
    found.add_argument(
        "--min_length",
        type=int,
        default=8192,
        help="documents must be longer than so many characters (default: %(default)s)",
    )
    counts = (("train", 1000, "training"), ("test", 50, "test"))
    for name, count, what in counts:
        text = f"{what} documents of a genre (default: {count})"
        found.add_argument(f"--{name}", type=int, default=count, help=text)
    found.add_argument(
        "--push", metavar="REPO", help="then upload to this hub data set; asks first"
    )
    command.add_debug_flag(found)
    return found


def recipe(flags: argparse.ArgumentParser, args: argparse.Namespace) -> Recipe:
    """What the flags ask for; leaves through parser.error where they make no sense."""
    if args.min_length < 0:
        flags.error(f"--min_length {args.min_length}: must be at least 0")
    for name in ("train", "test"):
        if getattr(args, name) < 1:
            flags.error(f"--{name} {getattr(args, name)}: must be at least 1")
    divider: int | str = int(args.divider) if args.divider.isdecimal() else args.divider.strip()
    if not divider:
        flags.error(f"--divider {args.divider!r}: give 1 or more blank lines, or a line's text")
    if args.published_divider and isinstance(divider, str):
        flags.error(f"--published_divider counts blank lines, but --divider is {divider!r}")
    if args.push and not REPOSITORY.fullmatch(args.push):
        flags.error(f"--push {args.push}: not a repository; give OWNER/NAME")
    return Recipe(divider, args.published_divider, args.min_length, args.train, args.test)


def main(argv: list[str]) -> None:
    flags = parser()
    args = flags.parse_args(argv)
    rules = recipe(flags, args)
    if args.push:
        check_login(args.push)
    dumps = find_dumps(Path(args.dumps), args.genres)
    build(dumps, Path(args.out), rules)
    if args.push:
        push(Path(args.out), args.push)


if __name__ == "__main__":
    sys.exit(command.run(main))
