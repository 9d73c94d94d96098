"""Build the published calibration and test texts from the five raw dumps of UberText 2.0.

    bash launch.sh ubertext FOLDER_OF_DUMPS OUT

Of each genre, the first 1,000 documents longer than 8,192 characters become OUT/train.jsonl, the
next 50 OUT/test.jsonl; OUT then serves as --calibration_data. Dumps are bz2 or plain. As in the
published builder, a length is counted before white space is folded. Dumps:
https://lang.org.ua/en/ubertext/ (Chaplynskyi, UNLP 2023). `hf upload OWNER/NAME OUT
--repo-type dataset --private` puts the result on the hub.
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lib.util import command
from lib.util.errors import UserError
from lib.util.progress import progress

GENRES = ("court", "fiction", "news", "social", "wiki")
DIVIDER = 3  # blank lines between two documents
BZ2_MAGIC = b"BZh"
MIN_LENGTH = 8192  # characters; a document must be longer
TRAIN, TEST = 1000, 50  # documents of each genre


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


def long_documents(dump: Path, add_up: bool) -> Iterator[str]:
    """Yield the documents of a dump that are longer than MIN_LENGTH, white space folded.

    Raises UserError if the dump is damaged, is not UTF-8, or has no such document.
    """
    with dump.open("rb") as file:
        compressed = file.read(len(BZ2_MAGIC)) == BZ2_MAGIC
    longest = 0
    try:
        with (bz2.open if compressed else open)(dump, "rt", encoding="utf-8-sig") as text:
            for document in documents(text, add_up):
                longest = max(longest, len(document))
                if len(document) > MIN_LENGTH:
                    yield " ".join(document.split())
    except UnicodeDecodeError as error:
        raise UserError(f"{dump}: not UTF-8 text, nor bz2; give the dump as published") from error
    except (EOFError, OSError) as error:
        if not compressed or getattr(error, "errno", None):  # an error of the disk, not of the file
            raise
        raise UserError(f"{dump}: damaged bz2 ({error}); fetch it again") from error
    if longest <= MIN_LENGTH:
        raise UserError(
            f"{dump}: no document is longer than {MIN_LENGTH} characters, the longest has "
            f"{longest}; give the dump as published"
        )


def build(dumps: dict[str, Path], out: Path, add_up: bool = False) -> None:
    """Write train.jsonl and test.jsonl into the new folder `out`, whole or not at all."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"OUT {out}: exists already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    totals = {"train": 0, "test": 0}
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as parent:
        stage = Path(parent) / out.name
        stage.mkdir()
        with progress(len(dumps), "dumps", "dump") as on_progress:
            for genre, dump in dumps.items():
                texts = list(islice(long_documents(dump, add_up), TRAIN + TEST))
                parts = {"train": texts[:TRAIN], "test": texts[TRAIN:]}
                for split, part in parts.items():
                    totals[split] += len(part)
                    with (stage / f"{split}.jsonl").open("a", encoding="utf-8") as file:
                        for text in part:
                            row = {"text": text, "genre": genre}
                            file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if len(texts) < TRAIN + TEST:
                    print(
                        f"{dump.name}: only {len(parts['train'])} training and "
                        f"{len(parts['test'])} test documents are longer than {MIN_LENGTH} "
                        "characters",
                        file=sys.stderr,
                    )
                on_progress(1)
        os.rename(stage, out)
    print(
        f"wrote {out}: {totals['train']} train, {totals['test']} test documents of {len(dumps)} "
        "genres"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="launch.sh ubertext", description=__doc__.split("\n")[0], allow_abbrev=False
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
