"""Documents of a source: local files are read into memory here, hub sets by lib/data/hub.py.

JSON lines and plain text need neither `datasets` nor pyarrow. An error names file and line.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

from lib.data import hub
from lib.data.sources import Source, check_text, folder_files
from lib.util.errors import first_line

TEXT_CHARACTERS = 2**25  # read of a .txt file, whose tokens are in memory at once
EMPTY = "holds no text; give a source with at least one row"
log = logging.getLogger(__name__)


def read_documents(
    source: Source, split: str
) -> tuple[list[str] | hub.Column | hub.StreamedRows, str | None]:
    """Return the documents of a split (`train` or `test`) and their revision (hub commit or None).

    The documents are a sequence of texts, or of a streamed set an iterable of them. Raises
    UserError for whatever is wrong with the data.
    """
    if source.hub:
        return hub.load(source, split)
    texts = [text for path in _files_of(source, split) for text in _read(source, path)]
    if not texts:
        raise source.error(EMPTY)
    return texts, None


def check_source(source: Source, split: str) -> None:
    """Raise UserError if a source can't be read; quick enough for before a model loads.

    Only the first row of each local file is read; later rows are checked when the texts are read.
    Hub sets are looked up, with config, split and column.
    """
    if source.hub:
        hub.load(source, split)[0].check()
        return
    first_rows = [next(_read(source, path), None) for path in _files_of(source, split)]
    if not any(row is not None for row in first_rows):
        raise source.error(EMPTY)


def locations(source: Source, split: str) -> set[object]:
    """Return the files, or the split of a hub set, that the documents of a split are read from.

    Two sources that share none have no text in common.
    """
    if source.hub:
        return {hub.load(source, split)[0].location}
    return {path.resolve() for path in _files_of(source, split)}


def _files_of(source: Source, split: str) -> list[Path]:
    if not source.path.is_dir():
        return [source.path]
    paths = folder_files(source, split)
    if not paths:
        names = ", ".join(sorted(p.name for p in source.path.iterdir())[:8]) or "nothing"
        raise source.error(
            f"no {split}*.jsonl or {split}*.jsonl.gz in this folder (it holds: {names}); add one"
        )
    return paths


def _read(source: Source, path: Path) -> Iterator[str]:
    read = {".parquet": _parquet, ".txt": _plain_text}.get(path.suffix, _json_lines)
    try:
        yield from read(source, path)
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of them
        raise _damaged(source, path, error) from error


def _damaged(source: Source, path: Path, error: Exception) -> Exception:
    return source.error(f"{path} can't be read ({first_line(error)}); is it damaged?")


def _json_lines(source: Source, path: Path) -> Iterator[str]:
    """Yield the `text` of each row; a line ends at "\\n" alone, and blank lines are no rows."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(source, line, f"{path}, line {number}")


def _text_of(source: Source, line: bytes, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"{place}: not JSON ({error}); every line must be an object with a 'text'"
        raise source.error(problem) from None
    if not isinstance(row, dict):
        raise source.error(f'{place}: not an object; write {{"text": ...}}')
    if "text" not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise source.error(f"{place}: no column 'text'; the row has: {columns}")
    return check_text(source, row["text"], place)


def _parquet(source: Source, path: Path) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if source.column not in columns:
                listed = ", ".join(columns) or "none"
                raise source.error(f"no column {source.column!r}; the file has: {listed}")
            row = 0
            for batch in file.iter_batches(columns=[source.column]):
                for text in batch.column(0).to_pylist():
                    yield check_text(source, text, f"{path}, row {row}")
                    row += 1
    except (ArrowException, UnicodeDecodeError) as error:
        raise _damaged(source, path, error) from error


def _plain_text(source: Source, path: Path) -> Iterator[str]:
    """Yield the text of a .txt file, which is one document; nothing if it is blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(TEXT_CHARACTERS)
            if file.read(1):
                log.warning("%s: only its first %d characters are read", path, TEXT_CHARACTERS)
    except UnicodeDecodeError as error:
        raise source.error(f"{path}: not UTF-8 text ({error}); convert it") from None
    if text.strip():
        yield text
