"""Build the published calibration and test texts from the five raw dumps of UberText 2.0.

    python -m lib.data.ubertext FOLDER_OF_DUMPS OUT

Of each genre, the first 1,000 documents longer than 8,192 characters become OUT/train.jsonl, the
next 50 OUT/test.jsonl; OUT then serves as --calibration_data. Dumps are read as streams, bz2 or
plain. OUT is written whole or not at all. As in the published builder, a length is counted before
white space is folded. Dumps: https://lang.org.ua/en/ubertext/ (Chaplynskyi, UNLP 2023).
`hf upload OWNER/NAME OUT --repo-type dataset --private` puts the result on the hub.
"""

from __future__ import annotations

import argparse
import bz2
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lib.util import command
from lib.util.errors import UserError
from lib.util.folders import check_replaceable, staged_folder
from lib.util.progress import progress

GENRES = ("court", "fiction", "news", "social", "wiki")
DIVIDER = 3  # blank lines between two documents
BZ2_MAGIC = b"BZh"


@dataclass(frozen=True)
class Rule:
    """Which documents of a genre are taken; the defaults are the published ones."""

    min_length: int = 8192  # characters; a document must be longer
    train: int = 1000  # documents
    test: int = 50  # documents


def find_dumps(folder: Path) -> dict[str, Path]:
    """Return the file of each genre. Raises UserError if one has none or several."""
    if not folder.is_dir():
        raise UserError(f"FOLDER_OF_DUMPS {folder}: no such folder; name the one with the dumps")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    dumps = {}
    for genre in GENRES:
        matches = [file for file in files if genre in file.name.lower()]
        if len(matches) != 1:
            names = ", ".join(file.name for file in matches or files) or "nothing"
            problem = "several files with" if matches else "no file with"
            raise UserError(
                f"FOLDER_OF_DUMPS {folder}: {problem} {genre!r} in the name ({names}); keep one "
                "for each genre"
            )
        dumps[genre] = matches[0]
    return dumps


def documents(lines: Iterable[str], add_up: bool = False) -> Iterator[str]:
    """Yield the documents between dividers without their blank lines; empty ones are left out.

    With `add_up` blank lines of a document also count if they are not consecutive.
    """
    document: list[str] = []
    n_blank = 0
    for line in lines:
        if not line.isspace():
            n_blank = n_blank if add_up else 0
            document.append(line)
            continue
        n_blank += 1
        if n_blank == DIVIDER:
            n_blank = 0
            if document:
                yield "".join(document)
            document = []
    if document:
        yield "".join(document)


@contextmanager
def open_dump(path: Path) -> Iterator[TextIO]:
    """Open the text of a dump, bz2 or plain. Raises UserError if it is damaged or not UTF-8."""
    with path.open("rb") as file:
        compressed = file.read(len(BZ2_MAGIC)) == BZ2_MAGIC
    try:
        open_text = bz2.open if compressed else open
        with open_text(path, "rt", encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, nor bz2; give the dump as published") from error
    except (EOFError, OSError) as error:
        if not compressed or getattr(error, "errno", None):  # an error of the disk, not of the file
            raise
        raise UserError(f"{path}: damaged bz2 ({error}); fetch it again") from error


def build(
    dumps: dict[str, Path], out: Path, add_up: bool = False, rule: Rule | None = None
) -> None:
    """Write train.jsonl and test.jsonl into the folder `out`, which an earlier build may hold."""
    check_replaceable("OUT", str(out))
    rule = rule or Rule()
    total = len(dumps) * (rule.train + rule.test)
    with (
        staged_folder(out, "OUT") as stage,
        (stage / "train.jsonl").open("w", encoding="utf-8") as train,
        (stage / "test.jsonl").open("w", encoding="utf-8") as test,
        progress(total, "documents", "document") as on_progress,
    ):
        counts = [
            _write_genre(
                genre, dump, train, test, rule=rule, add_up=add_up, on_progress=on_progress
            )
            for genre, dump in dumps.items()
        ]
    n_train, n_test = map(sum, zip(*counts, strict=True))
    print(f"wrote {out}: {n_train} train, {n_test} test documents of {len(dumps)} genres")


def _write_genre(
    genre: str,
    dump: Path,
    train: TextIO,
    test: TextIO,
    *,
    rule: Rule,
    add_up: bool,
    on_progress: Callable[..., None],
) -> tuple[int, int]:
    """Write the documents of one genre; returns how many are train and test documents."""
    count = longest = 0
    with open_dump(dump) as text:
        for document in documents(text, add_up):
            longest = max(longest, len(document))
            if len(document) <= rule.min_length:
                continue
            row = {"text": " ".join(document.split()), "genre": genre}
            file = train if count < rule.train else test
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            on_progress(1)
            if count == rule.train + rule.test:
                return rule.train, rule.test
    if not count:
        raise UserError(
            f"{dump}: no document is longer than {rule.min_length} characters, the longest "
            f"has {longest}; give the dump as published"
        )
    n_train, n_test = min(count, rule.train), max(0, count - rule.train)
    print(
        f"{dump.name}: only {n_train} training and {n_test} test documents are longer than "
        f"{rule.min_length} characters",
        file=sys.stderr,
    )
    return n_train, n_test


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.data.ubertext",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("dumps", metavar="FOLDER_OF_DUMPS", help="folder with a file per genre")
    parser.add_argument("out", metavar="OUT", help="new folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--published_divider",
        action="store_true",
        help="count blank lines as the published builder did: they add up within a document, "
        "also if they are not consecutive",
    )
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    build(find_dumps(Path(args.dumps)), Path(args.out), args.published_divider)


if __name__ == "__main__":
    sys.exit(command.run(main))
