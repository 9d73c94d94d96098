"""Build the published calibration and test texts from the five raw dumps of UberText 2.0.
For those who want to repeat that dataset; runs download it from the Hub.

    bash launch.sh ubertext FOLDER_OF_DUMPS OUT [--push OWNER/NAME]

The first 1,000 documents of each genre longer than 8,192 characters become OUT/train.jsonl, the
next 50 OUT/test.jsonl. OUT then serves as --calibration_data. Dumps are bz2 or plain text. As in
the published builder, a length is counted before white space is folded; unlike there, only
consecutive blank lines divide documents. `--push` uploads both files to a Hub dataset.
Dumps: https://lang.org.ua/en/ubertext/ (Chaplynskyi, UNLP 2023).
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path

from ..util.cli import make_parser
from ..util.errors import UserError, first_line
from ..util.files import check_new_folder, staged_folder

GENRES = ("court", "fiction", "news", "social", "wiki")
DIVIDER = 3  # blank lines between two documents
BZ2_MAGIC = b"BZh"
MIN_LENGTH = 8192  # characters; a document must be longer
TRAIN, TEST = 1000, 50  # documents of each genre


def find_dumps(folder: Path) -> dict[str, Path]:
    """Return the file of each genre. Raises UserError if a genre has none or several."""
    dumps = {}
    for genre in GENRES:
        files = [path for path in folder.glob("[!.]*") if genre in path.name.lower()]
        if len(files) != 1:
            number = "several files have" if files else "no file has"
            fix = f"Give one for each of {', '.join(GENRES)}"
            raise UserError(f"FOLDER_OF_DUMPS {folder}", f"{number} {genre!r} in its name", fix)
        dumps[genre] = files[0]
    return dumps


def documents(lines: Iterable[str]) -> Iterator[str]:
    """Yield the documents between dividers without their blank lines; empty ones are left out."""
    document: list[str] = []
    for blank, group in groupby(chain(lines, ["\n"] * DIVIDER), str.isspace):
        if not blank:
            document += group
        elif document and len(list(group)) >= DIVIDER:
            yield "".join(document)
            document = []


def long_documents(dump: Path) -> Iterator[str]:
    """Yield the documents of a dump that are longer than MIN_LENGTH, white space folded.

    Raises UserError if the dump is damaged or not UTF-8.
    """
    try:
        with dump.open("rb") as file:
            compressed = file.read(len(BZ2_MAGIC)) == BZ2_MAGIC
        with (bz2.open if compressed else open)(dump, "rt", encoding="utf-8-sig") as text:
            for document in documents(text):
                if len(document) > MIN_LENGTH:
                    yield " ".join(document.split())
    except (UnicodeDecodeError, EOFError, OSError) as error:
        problem = f"it is neither UTF-8 text nor complete bz2 ({error})"
        raise UserError(str(dump), problem, "Download it again") from error


def build(dumps: dict[str, Path], out: Path) -> None:
    """Write train.jsonl and test.jsonl into the new folder `out`, complete or not at all.

    Raises UserError if a genre has too few long documents.
    """
    train: list[str] = []
    test: list[str] = []
    for genre, dump in dumps.items():
        texts = islice(long_documents(dump), TRAIN + TEST)
        rows = ({"text": text, "genre": genre} for text in texts)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if len(lines) < TRAIN + TEST:
            problem = f"{len(lines):,} documents are longer than {MIN_LENGTH:,} characters, and "
            problem += f"{TRAIN + TEST:,} are needed"
            raise UserError(str(dump), problem, "Download the complete dump")
        train += lines[:TRAIN]
        test += lines[TRAIN:]
        print(f"{dump.name}: {len(lines):,} documents", flush=True)
    with staged_folder(out, "OUT") as stage:
        (stage / "train.jsonl").write_text("".join(train), "utf-8")
        (stage / "test.jsonl").write_text("".join(test), "utf-8")
    print(f"wrote {out}: {len(train):,} train, {len(test):,} test documents")


@contextmanager
def _refused(name: str, advice: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a UserError of one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:  # a missing token is an OSError
        raise UserError(f"--push {name}", first_line(error), advice) from error


def main(argv: list[str]) -> None:
    parser = make_parser("ubertext", __doc__)
    parser.add_argument("dumps", metavar="FOLDER_OF_DUMPS", help="folder with a file per genre")
    parser.add_argument("out", metavar="OUT", help="new folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to this Hub dataset, private if new"
    )
    args = parser.parse_args(argv)
    name = args.push
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        parser.error(f"--push {name}: it is not a name of a Hub dataset. Give OWNER/NAME.")
    dumps = find_dumps(Path(args.dumps))
    check_new_folder("OUT", args.out)
    if name:
        from huggingface_hub import HfApi

        hub, kind = HfApi(), "dataset"
        with _refused(name, "Nothing was built. Log in with `hf auth login`"):
            hub.whoami()  # fails before an hour of work
    build(dumps, Path(args.out))
    if name:
        with _refused(name, f"OUT is whole. Run hf upload {name} {args.out} --repo-type dataset"):
            hub.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=args.out, repo_type=kind)
        print(f"uploaded: https://huggingface.co/datasets/{name}")
