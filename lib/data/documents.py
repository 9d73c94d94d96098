"""Read the documents of a source: local files into memory, Hub datasets with lib/data/hub.py.

JSON lines, CSV and plain text need neither `datasets` nor pyarrow. Errors name file and line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from ..util.errors import UserError, counted, first_line, one_line
from . import hub
from .chats import COLUMNS, TOOLS, Dialogue, Document
from .sources import FILES, JOINED, PLAIN, Source, folder_files, is_parted, text_of

TEXT_CHARACTERS = 2**25  # limit of plain text, whose tokens are in memory at once
ROWS_CHARACTERS = 2**29  # limit of rows, which are in memory at once with
ROW_CHARACTERS = 64  # overhead for each
TENTH = 10  # one document in this many is held out for evaluation
FEW = 20  # fewer documents are first cut into pieces, at blank lines, line breaks or blanks
PIECE_CHARACTERS = 4_000  # longest piece
BATCH_CHARACTERS = 4_000_000  # tokenized at a time, on all cores
NAMED = 8  # files of a folder named in a message
PIECE = re.compile(r"(?s).{2000,4000}?\n\s*\n|.{2000,4000}?\n|.{2000,4000}?\s|.{1,4000}")
SEPARATOR = re.compile(r"(?i)\"?sep=(.)\"?\s*")
Documents = list[Document] | hub.HubTexts
log = logging.getLogger(__name__)


class Corpus:
    """The documents of a source, which are read once; local ones are in memory until `free`.

    `parted`: a tenth of them are held out for evaluation. Passages of the local test sets `tests`
    are left out of the training text. `rows`: the documents, if they are in memory already.
    """

    def __init__(
        self,
        source: Source,
        parted: bool = False,
        tests: Sequence[Corpus] = (),
        rows: Sequence[Document] | None = None,
    ) -> None:
        self.source, self.tests, self.rows = source, tests, rows
        self.parted = parted or source.parted
        self._splits: dict[str, tuple[Documents, str | None]] = {}  # documents and revision

    def documents(self, split: str) -> Documents:
        """Return the documents of a split (`train` or `test`).

        They are a sequence of texts and dialogues; those of a streamed dataset can only be iterated
        over. Raises UserError for any problem with the data.
        """
        return self._split(split)[0]

    def revision(self, split: str) -> str | None:
        """Return the commit of a split on the Hub, None for local files."""
        return self._split(split)[1]

    def free(self) -> None:
        """Free the memory; the documents can be read again."""
        self._splits.clear()

    def _split(self, split: str) -> tuple[Documents, str | None]:
        if split not in self._splits:
            source = self.source
            read = hub.load(source, split) if source.hub else (self._read(split), None)
            self._splits[split] = read
        return self._splits[split]

    def joined(self) -> Corpus:
        """Return a corpus whose training documents are one text."""
        return Corpus(replace(self.source, draw=JOINED), self.parted, self.tests, self.rows)

    def is_parted(self, split: str) -> bool:
        """Return whether a split is only a part of the documents in its files."""
        return self.parted or is_parted(self.source, split)

    def files(self, split: str) -> tuple[list[Path], list[Path]]:
        """Return the files of a folder that a split reads, and those that it ignores."""
        return folder_files(self.source.path, "train" if self.is_parted(split) else split)

    def _read(self, split: str) -> list[Document]:
        source, texts, nulls = self.source, [], 0
        limit = left = TEXT_CHARACTERS if source.draw == JOINED else ROWS_CHARACTERS
        rows = ((source, text) for text in self.rows or ())
        if self.rows is None:
            rows = ((path, text) for path in _files_of(self, split) for text in _read(source, path))
        for file, text in rows:
            nulls += text is None
            texts += [] if text is None else [text]
            left -= ROW_CHARACTERS + len(text or "")
            if left <= 0:
                log.warning("%s: no more than %d characters are read", file, limit)
                break
        if nulls:
            rows = counted(nulls, "row")
            log.warning("%s: %s without a %r left out", source, rows, source.column)
        if not texts:
            raise source.error("it holds no text", "Give a source with at least one row")
        if self.is_parted(split):
            texts = hold_out(source, texts, split)
        if self.tests and split == "train":
            texts = list(self._not_measured(texts)) or texts
        return ["\n\n".join(texts)] if source.draw == JOINED and split == "train" else texts

    def _not_measured(self, texts: list[Document]) -> Iterator[Document]:
        """Yield the training texts with every passage that occurs in the test texts removed."""
        tests = [text for test in self.tests for text in test.documents("test")]
        measured = {text.strip() for text in tests}.union(*map(pieces_of, tests))
        for text in texts:
            pieces = pieces_of(text) if text.strip() not in measured else []
            left = [piece for piece in pieces if piece not in measured]
            yield from [text] if left == pieces != [] else left


def hold_out(source: Source, texts: list[Document], split: str) -> list[Document]:
    """Return the held-out 10% of the documents (`test`), or the others (`train`).

    The held-out documents have the lowest digests, so that order and copies do not matter. Raises
    UserError if there is only one document.
    """
    if len(texts) < FEW:
        texts = [piece for text in texts for piece in pieces_of(text)]
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise source.error(
            f"it has {sum(map(len, texts))} characters, too few to hold out a tenth for evaluation",
            "Give more text, or each document as a row, or name a test text with {--eval_data}",
        )
    last = distinct[(len(distinct) - 1) // TENTH]
    pairs = zip(texts, digests, strict=True)
    return [text for text, digest in pairs if (digest <= last) == (split == "test")]


def are_dialogues(documents: Iterable[Document]) -> bool:
    """Return whether the first document is a dialogue."""
    return isinstance(next(iter(documents), None), Dialogue)


def pieces_of(text: Document) -> list[Document]:
    """Split a text into pieces of 2,000 to PIECE_CHARACTERS characters, if it is that long."""
    if isinstance(text, Dialogue):
        return [text]
    return [piece.strip() for piece in PIECE.findall(text) if piece.strip()]


def passages(text: str, most: int) -> list[str]:
    """Split a text into passages of at most `most` + 1 characters, at blanks if there are any."""
    return re.findall(rf"\S(?:[\s\S]{{0,{most}}}(?=\s|$)|[\s\S]{{0,{most}}})", text)


def many_documents(corpus: Corpus, least: int) -> Iterable[Document]:
    """Return the training documents, or their pieces if there are fewer than `least` local ones."""
    documents = corpus.documents("train")
    if corpus.source.hub or len(documents) >= least:
        return documents
    return [piece for document in documents for piece in pieces_of(document)]


def batches(
    texts: Iterable[Document], limit: float = math.inf, least: int = BATCH_CHARACTERS
) -> Iterator[list[Document]]:
    """Yield lists of at least `least` characters until `limit` characters were read."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        limit -= len(text)
        if limit <= 0:
            break
        if size >= least:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check_corpus(corpus: Corpus, split: str) -> None:
    """Raise UserError if a corpus cannot be read; reads only the first row of a Hub dataset."""
    documents = corpus.documents(split)
    if corpus.source.hub:
        next(iter(replace(documents, first=0)))


def locations(corpus: Corpus, split: str) -> set[object]:
    """Return the local documents of a split, or the split's location in a Hub dataset.

    Two corpora without common locations have no text in common.
    """
    documents = corpus.documents(split)
    return {documents.location} if corpus.source.hub else {text.strip() for text in documents}


def read_line(corpus: Corpus, *splits: str) -> str:
    """Return a line on the files of a folder that the splits read, and those that none does."""
    found = [corpus.files(split) for split in splits]
    paths = {path for read, _ in found for path in read}
    left = sorted({path for _, ignored in found for path in ignored} - paths)
    size = sum(len(text) for split in splits for text in corpus.documents(split))
    line = f"{corpus.source}: {len(paths)} file{'s' * (len(paths) > 1)}, "
    line += f"{size:,} characters read" + f"; left out: {_names(left)}" * bool(left)
    return one_line(line)


def _names(paths: list[Path]) -> str:
    """Return the names of files and folders: the first few, and how many more there are."""
    names = [path.name + "/" * path.is_dir() for path in paths]
    more = f"and {len(names) - NAMED} more"
    return ", ".join([*names[:NAMED], *[more] * (len(names) > NAMED)])


def _files_of(corpus: Corpus, split: str) -> list[Path]:
    source = corpus.source
    if not source.path.is_dir():
        return [source.path]
    paths, _ = corpus.files(split)
    if not paths:
        every = sorted(source.path.iterdir())
        holds = f"(it holds: {_names(every) or 'nothing'})"
        subfolder = ", or name a subfolder" * any(path.is_dir() for path in every)
        raise source.error(
            f"the folder has neither train*.jsonl nor other texts {holds}",
            f"Add a file in {', '.join(FILES)}{subfolder}",
        )
    if others := [path for path in paths if not path.is_file()]:
        problem = f"{others[0]} is a pipe, a device or a broken link"
        raise source.error(problem, "Remove it")
    return paths


def _read(source: Source, path: Path) -> Iterator[Document | None]:
    kinds = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv} | dict.fromkeys(PLAIN, _plain_text)
    try:
        yield from kinds.get(path.suffix.lower(), _json)(source, path)
    except UnicodeDecodeError:
        raise _not_utf8(source, path) from None
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of these
        raise _damaged(source, path, error) from error
    except MemoryError:
        raise source.error(f"{path} does not fit in memory", "Give a smaller file") from None


def _damaged(source: Source, path: Path, error: Exception) -> UserError:
    problem = f"{path} cannot be read ({first_line(error)})"
    return source.error(problem, "Replace it if it is damaged")


def _not_utf8(source: Source, place: object) -> UserError:
    return source.error(f"{place}: it is not UTF-8", "Save it as UTF-8")


def _json(source: Source, path: Path) -> Iterator[Document | None]:
    """Yield the text of each row: of each line, or of each object in a list.

    Lines end only at "\\n", and blank lines are skipped.
    """
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        is_list = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        read = file.read if is_list else partial(file.readline, ROWS_CHARACTERS)
        for number, text in enumerate(iter(read, b""), start=1):
            place = path if is_list else f"{path}, line {number}"
            if len(text) == ROWS_CHARACTERS:
                problem = f"{place}: it has at least {len(text)} bytes"
                raise source.error(problem, "Cut it into rows")
            if not text.strip():
                continue
            try:
                found = json.loads(text)
            except UnicodeDecodeError:
                raise _not_utf8(source, place) from None
            except (ValueError, RecursionError) as error:
                problem = f"{place}: it is not JSON ({error})"
                raise source.error(problem, 'Write {"text": ...} in each line') from None
            for count, row in enumerate(found if is_list else [found], start=1):
                place = f"{path}, object {count}" if is_list else place
                if not isinstance(row, dict):
                    raise source.error(f"{place}: it is not an object", 'Write {"text": ...}')
                yield text_of(source, row, place)


def _csv(source: Source, path: Path) -> Iterator[Document | None]:
    """Yield the text of each row of a table with a header.

    In .tsv the separator is a tab. Excel's first line `sep=` names another. Otherwise it is the
    most frequent of commas, ";", tabs and "|" outside quotes in the header.
    """
    csv.field_size_limit(ROWS_CHARACTERS)
    with path.open(encoding="utf-8-sig") as file:
        lines = iter(lambda: file.readline(ROWS_CHARACTERS + 1), "")
        header = next(lines, "")
        declared = SEPARATOR.fullmatch(header)  # a separate line above the header
        unquoted = re.sub('"[^"]*"', "", header)
        by = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=unquoted.count)
        lines, by = (lines, declared[1]) if declared else (chain([header], lines), by)
        rows = csv.DictReader(lines, delimiter=by, strict=True)
        try:
            if rows.fieldnames:
                place = f"{path}, header (the first row)"
                text_of(source, dict.fromkeys(rows.fieldnames), place)  # raises the error
            for row in rows:
                place, surplus = f"{path}, line {rows.line_num + bool(declared)}", row.pop(None, [])
                text = text_of(source, row, place)
                if surplus:
                    fields = f"{len(row) + len(surplus)} fields, separated by {by!r}"
                    problem = f"{place}: it has {fields}, and the header has {len(row)}"
                    raise source.error(problem, "Quote the texts, or give .txt or .jsonl")
                yield text
        except csv.Error as error:
            place = f"{path}, line {rows.line_num + 1 + bool(declared)}"
            kind, reason = path.suffix[1:].upper(), str(error).replace("\t", r"\t")
            fix = "Quote such a text, and double the quotes in it"
            raise source.error(f"{place}: it is not {kind} ({reason})", fix) from None


def _parquet(source: Source, path: Path) -> Iterator[Document | None]:
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(path)
        own = [source.column, TOOLS]
        names = schema.names if source.column not in schema.names else own
        names = [name for name in names if name in schema.names]
        columns = [name for name in names if name == source.column or name in COLUMNS]
        if not columns:
            text_of(source, dict.fromkeys(schema.names), path)  # raises the error
        # dictionaries keep a repeated text in memory once, but do not work for nested values
        nested = {name for name in columns if schema.field(name).type.num_fields}
        repeated = [name for name in columns if name not in nested]
        with parquet.ParquetFile(path, read_dictionary=repeated) as file:
            batches = file.iter_batches(columns=columns)
            rows = (row for batch in batches for row in zip(*batch.columns, strict=True))
            for number, row in enumerate(rows):
                values = zip(columns, (value.as_py() for value in row), strict=True)
                yield text_of(source, dict(values), f"{path}, row {number}")
    except (ArrowException, UnicodeDecodeError) as error:
        raise _damaged(source, path, error) from error


def _plain_text(source: Source, path: Path) -> Iterator[str]:
    """Yield the text of a plain text file, which is one document; nothing if it is blank."""
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(TEXT_CHARACTERS)
    if text.strip():
        yield text
