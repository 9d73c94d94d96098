"""Documents of a source, one at a time: local files here, hub sets through lib/data/hub.py.

Nothing is held as Python objects: JSON lines are indexed by offset (and checked) in one pass, and
a document is parsed when it is asked for, so that memory does not grow with the text. JSON lines
and plain text need neither `datasets` nor pyarrow.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path

from lib.data import hub
from lib.data.sources import Source, folder_files

DAMAGE = (OSError, EOFError, zlib.error)  # a damaged .gz raises any of them


@contextmanager
def open_documents(
    source: Source, split: str, first_rows: bool = False
) -> Iterator[tuple[Sequence[str] | hub.StreamedRows, str | None]]:
    """The documents of a split (`train` or `test`) and their revision (hub commit or None).

    A sequence of texts, or for a streamed set an iterable of (row number, text). `first_rows`: of
    JSON lines read only the first row of each file. Raises UserError for whatever is wrong with
    the data.
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
    """Raise UserError where a source can't be read, cheaply: before a model loads.

    Of a local source the first row (of JSON lines, of each file); later rows are checked when the
    texts are read. Hub sets are looked up, with config, split and column.
    """
    with open_documents(source, split, first_rows=True) as (documents, _):
        if isinstance(documents, hub.StreamedRows):
            documents.check()
        else:
            documents[0]


class JsonLines(Sequence):
    """Rows with a `text` in .jsonl and .jsonl.gz files; blank lines are no rows.

    Every row is checked, so that what is wrong with one is told with its file and line.
    """

    def __init__(
        self, source: Source, paths: list[Path], files: ExitStack, first_rows: bool = False
    ) -> None:
        self.source = source
        self.handles = []
        self.ends = []  # rows up to and with each file
        self.offsets = array("Q")  # bytes from the start of the row's own file
        for path in paths:
            with _readable(source, path):
                self._index(path, files, first_rows)

    def _index(self, path: Path, files: ExitStack, first_row: bool) -> None:
        packed = path.suffix == ".gz"
        lines = files.enter_context(gzip.open(path) if packed else path.open("rb"))
        # rows are drawn in any order, which a compressed file can't do: keep it unpacked on disk
        handle = files.enter_context(tempfile.TemporaryFile()) if packed else lines
        offset = 0
        for number, line in enumerate(lines, 1):
            if packed:
                handle.write(line)
            if line.strip():
                self._check(line, f"{path}, line {number}")
                self.offsets.append(offset)
                if first_row:
                    break
            offset += len(line)
        self.handles.append(handle)
        self.ends.append(len(self.offsets))

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
        found = ", ".join(sorted(p.name for p in source.path.iterdir())[:8]) or "nothing"
        problem = f"no {split}*.jsonl or {split}*.jsonl.gz in this folder (it holds: {found})"
        raise source.error(f"{problem}; add one, rows with 'text'")
    return paths


def _plain_text(source: Source) -> list[str]:
    """A .txt file is one document."""
    try:
        with _readable(source, source.path):
            text = source.path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise source.error(f"not UTF-8 text ({error}); convert it") from None
    return [text] if text.strip() else []


def _check_text(text: object, source: Source, place: str) -> None:
    """UserError naming the place where a text is none that a tokenizer can take."""
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
