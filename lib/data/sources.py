"""Text sources: parse the names that users give into `Source` objects. Imports nothing heavy.

A source is a built-in name (the table below), a Hub dataset `owner/name[:config][:split][:column]`
(an empty part means the default), or a local file or folder `PATH[:column][:train or :test]`. A
built-in name has precedence over a local folder (`./c4`), a local name over the Hub. `NAME=WEIGHT`
gives a source its weight in a mix. A new built-in source is one entry of the table.

From a folder, files with the word `train` or `test` in their names are read, or else all. Without a
test file, `NAME:test` is the held-out 10% of a local text: use it for evaluation, and the rest,
`NAME:train`, for calibration and training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ..util.errors import UserError, spelled
from .chats import DialogueError, Document, dialogue_of, plain_text

ONCE = "once"  # each document gives at most one window (UberText's rule)
AGAIN = "again"  # a document may be drawn repeatedly (C4's rule)
JOINED = "joined"  # all documents are one text with windows anywhere in it (WikiText-2's rule)

ROWS = (".jsonl", ".jsonl.gz")
JSON = (".json",)  # from a folder read last, since others are settings
TABLES = (".csv", ".tsv", ".parquet")
PLAIN = (".txt", ".md")
FILES = (*ROWS, *JSON, *TABLES, *PLAIN)
PARTS = ("train", "test")
PART = re.compile(rf":({'|'.join(PARTS)})$")
LONGEST = 40  # characters of a column's name in a message: of a text, if there is no header
SPLIT = re.compile(r"(?i)(?<![^\W\d_])(train|test)(?:s|ing|set)?(?![^\W\d_])")  # as a whole word
ABOUT = re.compile(r"(?i)(readme|licen[cs]e)(?![^\W\d_])")  # files that are not part of a corpus
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]*){0,3}")


@dataclass(frozen=True)
class Source:
    """A set of texts and the rules for drawing from it. With neither `path` nor `hub`, in memory.

    A `sampled` set is too large to measure in full: its first documents and windows are the test.
    """

    text: str  # as the user wrote it, without the weight
    flag: str  # the flag that named it, or the field of an error, as `{--calibration_data}`
    name: str  # short name for tables and figures
    weight: float | None = None
    path: Path | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None  # None: train for calibration, test or validation for evaluation
    column: str = "text"
    language: str | None = None  # selects rows by their `language_code`
    train_file: str | None = None  # a single file of the Hub dataset instead of a whole split
    test_file: str | None = None
    stream: bool = False
    draw: str = ONCE
    sampled: bool = False
    separator: str = "\n\n"  # between documents of the test text
    parted: bool = False  # 10% of the local documents are the test, the others for training
    as_text: bool = False  # read dialogues as plain text

    def __str__(self) -> str:
        return spelled(f"{self.flag} {self.text}")

    def error(self, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
        """Return an error that names flag and value of this source."""
        return kind(f"{self.flag} {self.text}", problem, fix)


STREAMED = dict(stream=True, sampled=True)
BUILT_IN: dict[str, dict] = {
    "ubertext": dict(hub="mshamrai/lang-pruning-uk-uber-text-2"),
    "c4": dict(
        hub="allenai/c4",
        train_file="en/c4-train.00000-of-01024.json.gz",
        test_file="en/c4-validation.00000-of-00008.json.gz",
        draw=AGAIN,
        sampled=True,
        separator=" ",
    ),
    "c4:LANGUAGE": dict(hub="allenai/c4", config="{}", **STREAMED),
    "fineweb": dict(hub="HuggingFaceFW/fineweb", config="sample-10BT", **STREAMED),
    "fineweb2:LANGUAGE": dict(hub="HuggingFaceFW/fineweb-2", config="{}", **STREAMED),
    "wikipedia:LANGUAGE": dict(hub="wikimedia/wikipedia", config="20231101.{}", **STREAMED),
    "aya:LANGUAGE": dict(hub="CohereLabs/aya_dataset", language="{}"),
    "wikitext2": dict(hub="Salesforce/wikitext", config="wikitext-2-raw-v1", draw=JOINED),
}


def parse_source(text: str, flag: str, column: str = "text", as_text: bool = False) -> Source:
    """Return the source that `text` names; `flag` is the flag that it was given to.

    `column` holds the texts of local files and of Hub datasets that are not built in. `as_text`:
    dialogues are read as plain text. The file system decides whether a name is local; the network
    is not used. Raises UserError for an unknown name and for an invalid weight.
    """
    if "=" in text and not is_in_path("=", text):
        text, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            problem = "the weight is not a finite number above 0"
            raise UserError(f"{flag} {text}={weight}", problem, f"Give one, such as {text}=0.5")
        return replace(parse_source(text, flag, column, as_text), weight=value)
    source = _built_in(text, flag) or _local(text, flag, column) or _on_hub(text, flag, column)
    if source:
        return replace(source, as_text=as_text)
    raise UserError(
        f"{flag} {text}",
        "no such name, folder or file exists",
        f"Give {', '.join(BUILT_IN)}, a Hub dataset owner/name[:config][:split][:column], or a "
        f"file or folder PATH[:column] ({', '.join(FILES)})",
    )


def parse_sources(
    texts: Sequence[str],
    flag: str,
    mixture: bool = False,
    column: str = "text",
    as_text: bool = False,
) -> list[Source]:
    """Return all sources of one flag, with different names; `mixture` allows weights.

    Without weights all sources of a mix count equally. Raises UserError also for a source that
    is named twice, and if only some have a weight.
    """
    sources = [parse_source(text, flag, column, as_text) for text in texts]
    for source in sources:
        if source.weight is not None and not mixture:
            raise source.error("it takes no weight", f"Leave out ={source.weight:g}")
    if any(s.weight is None for s in sources) and any(s.weight is not None for s in sources):
        problem = "only some sources have a weight"
        raise UserError(f"{flag} {' '.join(texts)}", problem, "Give NAME=WEIGHT to all")
    identities = [(s.path.resolve(), s.column) if s.path else s.text for s in sources]
    for source, identity in zip(sources, identities, strict=True):
        if identities.count(identity) > 1:
            raise source.error("it is named twice", "Name it once")
    return _with_unique_names(sources)


def local_name(text: str) -> tuple[Path, list[str]] | None:
    """Return the file or folder that a text begins with, the longest name that exists, and the
    parts after it, each after a colon; None if there is none."""
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        path = Path(":".join(parts[:count])).expanduser()
        if parts[0] and path.exists():
            return path, parts[count:]
    return None


def is_in_path(sign: str, text: str) -> bool:
    """Return whether a text names a local file or folder, with the sign at most in its path."""
    found = local_name(text)
    return bool(found) and sign not in ":".join(found[1])


def mixture_name(sources: Sequence[Source]) -> str:
    """Return `uk` for one source, `uk=0.75+en=0.25` for a mix."""
    if len(sources) == 1:
        return sources[0].name
    total = sum(s.weight or 1 for s in sources)
    return "+".join(f"{s.name}={(s.weight or 1) / total:.3g}" for s in sources)


def folder_files(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the files of one split (`train` or `test`) of a folder, and the ignored ones.

    Both are sorted by name. If no file is named `train`, all that are not named `test` are the
    train text. JSON lines are preferred to tables, tables to plain text, and these to other JSON. A
    README is read only if there is no other file. Hidden files are never read.
    """
    paths = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    splits = {p: SPLIT.search(p.name) for p in paths}
    splits = {p: match and match[1].lower() for p, match in splits.items()}
    named = [p for p in paths if splits[p] == split]
    others = [p for p in paths if split == "train" and splits[p] != "test"]
    kinds = product((False, True), (named, others), (ROWS, TABLES, PLAIN, JSON))
    for is_about, group, endings in kinds:
        files = [p for p in group if p.name.lower().endswith(endings) and not p.is_dir()]
        if chosen := [p for p in files if bool(ABOUT.match(p.name)) == is_about]:
            return chosen, [p for p in others or named if p not in chosen]
    return [], others or named


def text_of(source: Source, row: Mapping[str, object], place: object) -> Document | None:
    """Return the row's text or dialogue, None for null. UserError if it cannot be tokenized."""
    text = row.get(source.column)
    has_messages = isinstance(text, list) and all(isinstance(each, dict) for each in text)
    if source.column not in row or has_messages:
        try:
            dialogue = dialogue_of(row, source.column)
            if not (dialogue and source.as_text):
                return dialogue
            text = plain_text(dialogue)
        except LookupError:
            names = (" ".join(str(name).split()) for name in row)
            names = (name[:LONGEST] + "…" * (len(name) > LONGEST) for name in names)
            problem = f"{place}: there is no column {source.column!r}, only "
            where = f"{source.hub}:{source.config or ''}:{source.split or ''}"
            fix = f"Name one with --column, or as {source.path or where}:COLUMN, or give dialogues"
            raise source.error(problem + (", ".join(names) or "none"), fix) from None
        except DialogueError as error:
            raise source.error(f"{place}: {error.problem}", error.fix) from None
    if text is None:
        return None
    if not isinstance(text, str):
        problem = f"{source.column!r} is of type {type(text).__name__}, not a string"
        raise source.error(f"{place}: {problem}", "Name a column of texts with --column")
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"{place}: the text has half of a surrogate pair"
        raise source.error(problem, "Repair it") from None
    return text


def has_test(source: Source) -> bool:
    """Return whether the source is a local folder with a test text."""
    return bool(source.path and source.path.is_dir() and folder_files(source.path, "test")[0])


def is_parted(source: Source, split: str) -> bool:
    """Return whether a split of the source is by itself a part of the documents in its files."""
    is_folder = bool(source.path and source.path.is_dir())
    return source.parted or (split == "test" and is_folder and not has_test(source))


def _local(text: str, flag: str, column: str) -> Source | None:
    path, parts = local_name(text) or (Path(text.partition(":")[0]), None)
    ending = next((e for e in FILES if path.name.lower().endswith(e)), None)
    if parts is None:
        if ending or text.startswith(("/", ".", "~")) or text.count("/") > 1:
            raise UserError(f"{flag} {text}", "no such file or folder exists", "Check the path")
        return None
    if path.is_dir():
        name, files = path.resolve().name, folder_files(path, "train")[0]
    elif path.is_file() and ending:
        name, files = path.name[: -len(ending)], [path]
    else:
        fix = f"Give one of {', '.join(FILES)}"
        raise UserError(f"{flag} {text}", "its type is unknown", fix)
    is_plain = any(file.name.lower().endswith(PLAIN) for file in files)
    columns = [part for part in parts if part and part not in PARTS]
    if wrong := columns[not is_plain :]:
        fix = "Name one column of rows, which plain text lacks"
        raise UserError(f"{flag} {text}", f"it has no column {wrong[0]!r}", fix)
    options = dict(column=(columns or [column])[0], draw=JOINED if is_plain else ONCE)
    source = Source(text, flag, ":".join([name, *columns]), path=path, **options)
    return replace(source, parted=not {*PARTS}.isdisjoint(parts) and not has_test(source))


def _built_in(text: str, flag: str) -> Source | None:
    if text in BUILT_IN:
        return Source(text, flag, text, **BUILT_IN[text])
    name, _, language = text.partition(":")
    entry = BUILT_IN.get(f"{name}:LANGUAGE")
    if not (entry and language):
        return None
    place = "language" if "language" in entry else "config"
    return Source(text, flag, text, **entry | {place: entry[place].format(language)})


def _on_hub(text: str, flag: str, column: str) -> Source | None:
    if not HUB_ID.fullmatch(text):
        return None
    hub, *parts = text.split(":")
    config, split, own_column = [part or None for part in (*parts, "", "", "")[:3]]
    place = {"hub": hub, "config": config} if config else {"hub": hub}
    entries = [e for e in BUILT_IN.values() if not e.keys() & {"train_file", "language"}]
    same = (e for e in entries if place == {k: e[k] for k in ("hub", "config") if k in e})
    rules = next(same, STREAMED) | place | dict(split=split, column=own_column or column)
    return Source(text, flag, text.partition("/")[2], **rules)


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Prefix equal names with the parent folder; if they are still equal, use the whole text."""
    for longer in (lambda s: f"{s.path.resolve().parent.name}/{s.name}", lambda s: s.text):
        count = Counter(s.name for s in sources)
        sources = [
            replace(s, name=longer(s)) if count[s.name] > 1 and s.path else s for s in sources
        ]
    return sources
