"""Documents of a source, one at a time: local files here, hub sets through lib/data/hub.py.

Nothing is held as Python objects: JSON lines are indexed by offset (and checked) in one pass, and
a document is parsed when it is asked for, so that memory does not grow with the text.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.data import hub
from lib.data.sources import Source, folder_files

CHECKED_ROWS = 10_000  # of each file, before the model loads
UNREADABLE = (OSError, EOFError, zlib.error)  # a damaged .gz raises any of them


@contextmanager
def open_documents(
    source: Source, split: str, cache_dir: str | None = None, limit: int | None = None
) -> Iterator[tuple[Sequence[str] | hub.StreamedRows, str | None]]:
    """The documents of a split (`train` or `test`) and their revision (hub commit or None).

    A sequence of texts, or for a streamed set an iterable of (row number, text). `limit`: read no
    more than so many rows of each file. Raises UserError for whatever is wrong with the data.
    """
    if source.hub:
        yield hub.load(source, split, cache_dir)
        return
    with ExitStack() as files:
        if source.path.is_dir():
            documents = JsonLines(source, _files_of(source, split), files, limit)
        elif source.path.suffix == ".parquet":
            documents = Parquet(source, files)
        elif source.path.suffix == ".txt":
            documents = _plain_text(source)
        else:
            documents = JsonLines(source, [source.path], files, limit)
        if not len(documents):
            raise source.error("holds no text; give a source with at least one row")
        yield documents, None


def check_source(source: Source, split: str, cache_dir: str | None = None) -> None:
    """Raise UserError where a source can't be read, cheaply: before a model loads.

    Local JSON lines are checked row by row up to `CHECKED_ROWS` of each file; later rows are
    checked when the texts are read. Hub sets are looked up, with config, split and column.
    """
    with open_documents(source, split, cache_dir, limit=CHECKED_ROWS) as (documents, _):
        if isinstance(documents, hub.StreamedRows):
            documents.check()
        else:
            documents[0]


class JsonLines(Sequence):
    """Rows with a `text` in .jsonl and .jsonl.gz files; blank lines are no rows."""

    def __init__(
        self, source: Source, paths: list[Path], files: ExitStack, limit: int | None = None
    ) -> None:
        self.source = source
        self.handles = []
        self.ends = []  # rows up to and with each file
        self.offsets = array("Q")  # bytes from the start of the row's own file
        for path in paths:
            try:
                self._index(path, files, limit)
            except UNREADABLE as error:
                raise source.error(f"{path} can't be read ({error}); is it damaged?") from error

    def _index(self, path: Path, files: ExitStack, limit: int | None) -> None:
        packed = path.suffix == ".gz"
        lines = files.enter_context(gzip.open(path) if packed else path.open("rb"))
        # rows are drawn in any order, which a compressed file can't do: keep it unpacked on disk
        handle = files.enter_context(tempfile.TemporaryFile()) if packed else lines
        offset, end = 0, len(self.offsets) + (limit or 2**63)
        for number, line in enumerate(lines, 1):
            if packed:
                handle.write(line)
            if line.strip():
                self._text(line, f"{path}, line {number}")
                self.offsets.append(offset)
            offset += len(line)
            if len(self.offsets) == end:
                break
        self.handles.append(handle)
        self.ends.append(len(self.offsets))

    def _text(self, line: bytes, place: str) -> str:
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
        return checked(row["text"], self.source, place)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        handle = self.handles[bisect_right(self.ends, row)]
        handle.seek(self.offsets[row])
        return self._text(handle.readline(), f"row {row}")


class Parquet(Sequence):
    """The `text` column of a parquet file; one row group is in memory at a time."""

    def __init__(self, source: Source, files: ExitStack) -> None:
        from pyarrow import ArrowException, parquet

        self.source = source
        self.damage = (ArrowException, OSError)
        try:
            self.file = files.enter_context(parquet.ParquetFile(source.path))
        except self.damage as error:
            raise self._unreadable(error) from error
        columns = self.file.schema_arrow.names
        if source.column not in columns:
            problem = f"no column {source.column!r}; the file has: {', '.join(columns) or 'none'}"
            raise source.error(problem)
        meta = self.file.metadata
        self.ends = []  # rows up to and with each row group
        for group in range(meta.num_row_groups):
            self.ends.append(meta.row_group(group).num_rows + (self.ends or [0])[-1])
        self.group, self.texts = -1, None

    def _unreadable(self, error: Exception) -> Exception:
        reason = str(error).partition("\n")[0]
        return self.source.error(f"{self.source.path} can't be read ({reason}); is it damaged?")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect_right(self.ends, row)
        if group != self.group:
            try:
                table = self.file.read_row_group(group, columns=[self.source.column])
            except self.damage as error:
                raise self._unreadable(error) from error
            self.group, self.texts = group, table.column(0)
        text = self.texts[row - (self.ends[group] - len(self.texts))].as_py()
        return checked(text, self.source, f"{self.source.path}, row {row}")


def checked(text: object, source: Source, place: str) -> str:
    """`text` if it is one that a tokenizer can take; UserError naming the place if not."""
    if not isinstance(text, str):
        raise source.error(f"{place}: the text is of type {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise source.error(f"{place}: the text has half of a surrogate pair; repair it") from None
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
        text = source.path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise source.error(f"not UTF-8 text ({error}); convert it") from None
    except OSError as error:
        raise source.error(f"can't be read ({error.strerror})") from error
    return [text] if text.strip() else []
