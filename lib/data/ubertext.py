"""Build the published calibration and test texts from the five raw dumps of UberText 2.0.

    python -m lib.data.ubertext FOLDER_OF_DUMPS OUT

Of each genre, the first 1,000 documents longer than 8,192 characters become OUT/train.jsonl, the
next 50 OUT/test.jsonl; OUT then serves as --calibration_data. Dumps are read as streams, bz2 or
plain. Genres that are finished are kept in OUT.partial, where an interrupted build goes on. The
flags make the same of any other corpus. As in the published builder a length is counted before
white space is folded. Dumps: https://lang.org.ua/en/ubertext/ (Chaplynskyi, UNLP 2023).
`hf upload OWNER/NAME OUT --repo-type dataset --private` puts the result on the hub.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lib.util import command
from lib.util.errors import UserError
from lib.util.files import write_text
from lib.util.folders import staged_folder
from lib.util.progress import progress

GENRES = ("court", "fiction", "news", "social", "wiki")
EVERY_FILE = "*"
SPLITS = ("train", "test")
BUILD = "build.json"  # beside the splits: what they were built from
BZ2_MAGIC = b"BZh"


@dataclass(frozen=True)
class Rules:
    """How documents are told apart and which are taken."""

    divider: int | str  # blank lines, or the text of a line
    add_up: bool  # blank lines count also where they are not in a row
    min_length: int  # characters; documents must be longer
    train: int  # documents of a genre
    test: int


def find_dumps(folder: Path, genres: Sequence[str]) -> dict[str, Path]:
    """The file of each genre. UserError where one has none or several."""
    if not folder.is_dir():
        raise UserError(f"FOLDER_OF_DUMPS {folder}: no such folder; name the one with the dumps")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if list(genres) == [EVERY_FILE]:
        if not files:
            raise UserError(f"FOLDER_OF_DUMPS {folder}: holds no file")
        genres = [file.name.split(".")[0] for file in files]
    found = {}
    for genre in genres:
        fitting = [file for file in files if genre.lower() in file.name.lower()]
        exact = [file for file in fitting if file.name.split(".")[0] == genre]
        fitting = exact if len(exact) == 1 else fitting
        if len(fitting) != 1:
            names = ", ".join(file.name for file in fitting or files) or "nothing"
            problem = "several files with" if fitting else "no file with"
            raise UserError(
                f"FOLDER_OF_DUMPS {folder}: {problem} {genre!r} in the name ({names}); "
                "keep one for each genre, or name other --genres"
            )
        found[genre] = fitting[0]
    return found


def documents(lines: Iterable[str], divider: int | str, add_up: bool = False) -> Iterator[str]:
    """The documents between dividers, without their blank lines; empty ones are left out."""
    document: list[str] = []
    blank = 0
    for line in lines:
        if divider == line.strip():
            ended = True
        elif line.isspace():
            blank += 1
            ended = blank == divider
        else:
            blank = blank if add_up else 0
            document.append(line)
            continue
        if ended:
            blank = 0
            if document:
                yield "".join(document)
            document = []
    if document:
        yield "".join(document)


@contextmanager
def open_dump(path: Path) -> Iterator[TextIO]:
    """The text of a dump, bz2 or plain. UserError where it is damaged or not UTF-8."""
    with path.open("rb") as file:
        packed = file.read(len(BZ2_MAGIC)) == BZ2_MAGIC
    try:
        opened = bz2.open if packed else open
        with opened(path, "rt", encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, nor bz2; give the dump as published") from error
    except (EOFError, OSError) as error:
        if not packed or getattr(error, "errno", None):  # the disk's trouble, not the file's
            raise
        raise UserError(f"{path}: damaged bz2 ({error}); fetch it again") from error


def build(dumps: dict[str, Path], out: Path, rules: Rules) -> None:
    """Write folder `out`, whole or not at all; does nothing where it holds this very build."""
    plan = {genre: _plan(path, rules) for genre, path in dumps.items()}
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out}: is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        if not _is_built(out / BUILD, plan):
            raise UserError(f"OUT {out}: holds something else; name a new folder or remove it")
        print(f"{out} holds this build already")
        return
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    left = [g for g in dumps if not _is_built(partial / f"{g}.json", plan[g])]
    print(f"genres to build: {', '.join(left) or 'none'}; finished ones stay in {partial}")
    with progress(len(left) * (rules.train + rules.test), "documents", "document") as advance:
        for genre in left:
            counts = _build_genre(genre, dumps[genre], partial, rules, advance)
            _write_build(partial / f"{genre}.json", plan[genre], counts)
    _join(list(dumps), partial, out, plan)
    shutil.rmtree(partial)


def _plan(path: Path, rules: Rules) -> dict[str, Any]:
    """What decides the outcome for a genre: a build with the same plan need not be repeated."""
    return {**asdict(rules), "file": path.name, "bytes": path.stat().st_size}


def _is_built(path: Path, plan: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["plan"] == plan
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _write_build(path: Path, plan: dict[str, Any], counts: dict[str, Any]) -> None:
    write_text(path, json.dumps({"plan": plan, **counts}, indent=2, ensure_ascii=False) + "\n")


def _build_genre(
    genre: str, dump: Path, folder: Path, rules: Rules, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write GENRE.train.jsonl and GENRE.test.jsonl; returns how many documents each has."""
    wanted = {"train": rules.train, "test": rules.test}
    counts = dict.fromkeys(SPLITS, 0)
    longest = 0
    with (
        open_dump(dump) as text,
        (folder / f"{genre}.train.jsonl").open("w", encoding="utf-8") as train,
        (folder / f"{genre}.test.jsonl").open("w", encoding="utf-8") as test,
    ):
        for document in documents(text, rules.divider, rules.add_up):
            longest = max(longest, len(document))
            if len(document) <= rules.min_length:
                continue
            split = "train" if counts["train"] < wanted["train"] else "test"
            row = {"text": " ".join(document.split()), "genre": genre}
            file = train if split == "train" else test
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[split] += 1
            advance(1)
            if counts == wanted:
                return counts
    if not counts["train"]:
        raise UserError(
            f"{dump}: no document is longer than {rules.min_length} characters, the longest has "
            f"{longest}; give a lower --min_length or the right --divider"
        )
    print(
        f"{dump.name}: only {counts['train']} training and {counts['test']} test documents are "
        f"longer than {rules.min_length} characters",
        file=sys.stderr,
    )
    return counts


def _join(genres: Sequence[str], partial: Path, out: Path, plan: dict[str, Any]) -> None:
    """Put the genres' files one after another, in their order, and `out` in place."""
    with staged_folder(out) as stage:
        facts: dict[str, Any] = {}
        for split in SPLITS:
            digest, rows = hashlib.sha256(), 0
            with (stage / f"{split}.jsonl").open("wb") as whole:
                for genre in genres:
                    with (partial / f"{genre}.{split}.jsonl").open("rb") as part:
                        for line in part:
                            digest.update(line)
                            rows += 1
                            whole.write(line)
            facts[split] = {"rows": rows, "sha256": digest.hexdigest()}
        _write_build(stage / BUILD, plan, facts)
    sizes = ", ".join(f"{facts[split]['rows']} {split}" for split in SPLITS)
    print(f"wrote {out}: {sizes} documents of {len(genres)} genres")


def parser() -> argparse.ArgumentParser:
    """The command's flags; the only place where their defaults stand."""
    found = argparse.ArgumentParser(
        prog="python -m lib.data.ubertext",
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
    command.add_debug_flag(found)
    return found


def rules_of(args: argparse.Namespace, flags: argparse.ArgumentParser) -> Rules:
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
    return Rules(divider, args.published_divider, args.min_length, args.train, args.test)


def main(argv: list[str]) -> None:
    flags = parser()
    args = flags.parse_args(argv)
    rules = rules_of(args, flags)
    build(find_dumps(Path(args.dumps), args.genres), Path(args.out), rules)


if __name__ == "__main__":
    sys.exit(command.run(main))
