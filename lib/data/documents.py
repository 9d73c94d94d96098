"""Documents of a source, one at a time: local files here, hub sets through lib/data/hub.py.

JSON lines are checked and indexed by offset in one pass, which a process makes once for each file;
a document is parsed when it is read, so memory does not grow with the text. JSON lines and plain
text need neither `datasets` nor pyarrow, an error names file and line, and no copy is left in a
cache.
"""

from __future__ import annotations

import errno
import gzip
import json
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from lib.data import hub
from lib.data.sources import Source, folder_files

DAMAGE = (OSError, EOFError, zlib.error)  # a damaged .gz raises any of them
LONGEST_LINE = 2**28  # bytes of a row
FREE_SPACE = 2**28  # bytes that unpacking leaves free on the disk of temporary files
CHECK_EVERY = 2**26  # unpacked bytes between two looks at the free space

# offsets of the rows of files that were read whole, by path, size and time
_indexes: dict[tuple, array] = {}


@contextmanager
def open_documents(
    source: Source, split: str, first_rows: bool = False
) -> Iterator[tuple[Sequence[str] | hub.StreamedRows, str | None]]:
    """Yield the documents of a split (`train` or `test`) and their revision (hub commit or None).

    The documents are a sequence of texts, or for a streamed set an iterable of (row number, text).
    With `first_rows` only the first row of each file of JSON lines is read. Raises UserError for
    whatever is wrong with the data.
    """
    if source.hub:
        yield hub.load(source, split)
        return
    with ExitStack() as files:
        if source.path.is_dir():
            documents = JsonLines(source, _files_of(source, split), files, first_rows)
        elif source.path.suffix == ".parquet":
            documents = Parquet(source, files)
        elif source.path.suffix == ".txt":
            documents = _plain_text(source)
        else:
            documents = JsonLines(source, [source.path], files, first_rows)
        if not len(documents):
            raise source.error("holds no text; give a source with at least one row")
        yield documents, None


def check_source(source: Source, split: str) -> None:
    """Raise UserError if a source can't be read; quick enough for before a model loads.

    Only the first row of a local source is read (of each file of JSON lines); later rows are
    checked when the texts are read. Hub sets are looked up, with config, split and column.
    """
    with open_documents(source, split, first_rows=True) as (documents, _):
        if isinstance(documents, hub.StreamedRows):
            documents.check()
        else:
            documents[0]


class JsonLines(Sequence):
    """Rows with a `text` in .jsonl and .jsonl.gz files; blank lines are no rows.

    Every row is checked; an error names its file and line.
    """

    def __init__(
        self, source: Source, paths: list[Path], files: ExitStack, first_rows: bool = False
    ) -> None:
        self.source = source
        self.handles = []
        self.ends = []  # number of rows up to the end of each file
        self.offsets = array("Q")  # bytes from the start of the row's own file
        for path in paths:
            with _readable(source, path):
                self._open(path, files, first_rows)

    def _open(self, path: Path, files: ExitStack, first_row: bool) -> None:
        """Open a file and append the offsets of its rows."""
        handle: BinaryIO
        if path.suffix != ".gz":
            handle = files.enter_context(path.open("rb"))
        elif first_row:
            handle = files.enter_context(gzip.open(path))
        else:  # rows are read in any order, which a compressed file does not allow
            handle = files.enter_context(tempfile.TemporaryFile())
            self._unpack(path, handle)
        facts = path.stat()
        key = (path.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ino)
        offsets = None if first_row else _indexes.get(key)
        if offsets is None:
            offsets = self._index(path, handle, first_row)
            if not first_row:
                _indexes[key] = offsets
        self.offsets.extend(offsets)
        self.handles.append(handle)
        self.ends.append(len(self.offsets))

    def _unpack(self, path: Path, handle: BinaryIO) -> None:
        """Unpack a file into a temporary one. Raises UserError if that would fill the disk."""
        folder = tempfile.gettempdir()
        problem = self.source.error(
            f"{path} does not fit into the temporary folder {folder} unpacked; unpack it "
            "yourself, or set TMPDIR to a folder with more room"
        )
        try:
            with gzip.open(path) as packed:
                unpacked = 0
                while piece := packed.read(2**20):
                    if unpacked % CHECK_EVERY == 0:
                        if shutil.disk_usage(folder).free < FREE_SPACE:
                            raise problem
                    unpacked += handle.write(piece)
            handle.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise problem from error
        handle.seek(0)

    def _index(self, path: Path, handle: BinaryIO, first_row: bool) -> array:
        """Check the rows of a file, or only its first one, and return their offsets."""
        offsets, offset, number = array("Q"), 0, 0
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise self.source.error(
                    f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB; write one "
                    "document a line"
                )
            if line.strip():
                self._check(line, f"{path}, line {number}")
                offsets.append(offset)
                if first_row:
                    break
            offset += len(line)
        return offsets

    def _check(self, line: bytes, place: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"{place}: not JSON ({error}); every line must be an object with a 'text'"
            raise self.source.error(problem) from None
        if not isinstance(row, dict):
            raise self.source.error(f'{place}: not an object; write {{"text": ...}}')
        if "text" not in row:
            columns = ", ".join(map(str, row)) or "none"
            raise self.source.error(f"{place}: no column 'text'; the row has: {columns}")
        _check_text(row["text"], self.source, place)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        handle = self.handles[bisect_right(self.ends, row)]
        handle.seek(self.offsets[row])
        return json.loads(handle.readline())["text"]


class Parquet(Sequence):
    """The `text` column of a parquet file; one row group is in memory at a time."""

    def __init__(self, source: Source, files: ExitStack) -> None:
        from pyarrow import parquet

        self.source = source
        with self._readable():
            self.file = files.enter_context(parquet.ParquetFile(source.path))
        columns = self.file.schema_arrow.names
        if source.column not in columns:
            problem = f"no column {source.column!r}; the file has: {', '.join(columns) or 'none'}"
            raise source.error(problem)
        meta = self.file.metadata
        groups = range(meta.num_row_groups)
        self.ends = list(accumulate(meta.row_group(group).num_rows for group in groups))
        self.group, self.texts = -1, None

    def _readable(self) -> AbstractContextManager:
        from pyarrow import ArrowException

        return _readable(self.source, self.source.path, ArrowException)

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect_right(self.ends, row)
        if group != self.group:
            with self._readable():
                table = self.file.read_row_group(group, columns=[self.source.column])
            self.group, self.texts = group, table.column(0)
        text = self.texts[row - (self.ends[group] - len(self.texts))].as_py()
        _check_text(text, self.source, f"{self.source.path}, row {row}")
        return text


def _files_of(source: Source, split: str) -> list[Path]:
    paths = folder_files(source, split)
    if not paths:
        names = ", ".join(sorted(p.name for p in source.path.iterdir())[:8]) or "nothing"
        problem = f"no {split}*.jsonl or {split}*.jsonl.gz in this folder (it holds: {names})"
        raise source.error(f"{problem}; add one, rows with 'text'")
    return paths


def _plain_text(source: Source) -> list[str]:
    """Return the text of a .txt file, which is one document; nothing if it is blank."""
    try:
        with _readable(source, source.path):
            text = source.path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise source.error(f"not UTF-8 text ({error}); convert it") from None
    return [text] if text.strip() else []


def _check_text(text: object, source: Source, place: str) -> None:
    """Raise UserError, with its place, if a text is not one that a tokenizer can take."""
    if not isinstance(text, str):
        raise source.error(f"{place}: the text is of type {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise source.error(f"{place}: the text has half of a surrogate pair; repair it") from None


@contextmanager
def _readable(source: Source, path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn damage, and the reader's own `errors`, into one UserError that names the file."""
    try:
        yield
    except (*DAMAGE, *errors) as error:
        reason = str(error).partition("\n")[0]
        raise source.error(f"{path} can't be read ({reason}); is it damaged?") from error
