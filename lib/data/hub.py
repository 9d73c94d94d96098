"""Data sets of the Hugging Face hub, whole or streamed; what goes wrong is told in one line.

Small sets are downloaded once by `datasets` and kept in its cache; large ones are streamed, so that
a few windows cost a few megabytes. The current commit is looked up first, and that one is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lib.data.sources import Source
from lib.util.errors import UserError

TEST_DOCUMENTS = 1_100  # the first documents of a large set, which are its test text
TIMEOUT = 10.0  # seconds for the hub's first answer
TESTS = ("test", "validation")


class Column(Sequence):
    """One column of a downloaded set."""

    def __init__(self, source: Source, rows: Sequence) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> str:
        return _text(self.source, self.rows[row], row)


class StreamedRows:
    """The (row number, text) pairs of a streamed set, in its own order, from row `first` on."""

    def __init__(self, source: Source, rows: object, first: int) -> None:
        self.source, self.rows, self.first = source, rows, first

    def __iter__(self) -> Iterator[tuple[int, str]]:
        count = 0
        with as_user_error(self.source):
            for number, row in enumerate(self.rows):
                text = _text(self.source, row, number)
                count += 1
                if number >= self.first:
                    yield number, text
        if count <= self.first:
            place = f"{self.source.hub}:{self.source.config or ''}:SPLIT"
            raise self.source.error(
                f"holds {count} rows, of which the first {self.first} are the test; name another "
                f"set, or the split to draw from: {place}"
            )

    def check(self) -> None:
        """Read one row; raises UserError if it can't be reached or is not text."""
        next(iter(StreamedRows(self.source, self.rows, first=0)))


def load(source: Source, split: str) -> tuple[Column | StreamedRows, str | None]:
    """Return the texts of a split (`train` or `test`) and their commit, None if unknown.

    Of a set without test and validation split the first `TEST_DOCUMENTS` rows are the test, and
    calibration starts after them, unless the user names the split.
    """
    from datasets import load_dataset

    with as_user_error(source):
        commit = revision(source)
        options = {"revision": commit, "streaming": source.stream or None}
        if source.train_file:
            name, file = _single_file(source, split)
            options["data_files"] = {name: file}
        options = {key: value for key, value in options.items() if value is not None}
        try:
            sets = load_dataset(source.hub, *filter(None, [source.config]), **options)
        except ValueError:
            if commit:  # the hub answers
                _check_config(source, commit)
            raise
        name = _split(source, split, list(sets))
        rows = sets[name]
        columns = rows.column_names  # None for a stream of files without a schema
        if columns and source.column not in columns:
            raise source.error(f"no column {source.column!r}; there are: {', '.join(columns)}")
        if source.stream:
            parted = split == "train" and not (source.split or any(t in sets for t in TESTS))
            return StreamedRows(source, rows, TEST_DOCUMENTS if parted else 0), commit
        if not len(rows):
            raise source.error(f"the split {name!r} is empty; name another")
        return Column(source, rows), commit


def revision(source: Source) -> str | None:
    """Return the current commit of the hub's set.

    Returns None in offline mode, and if the hub is out of reach but the set was downloaded before;
    `datasets` then looks into its cache. The hub is asked here because the attempts of `datasets`
    take half a minute to fail.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(source.hub, timeout=TIMEOUT).sha
    except OfflineModeIsEnabled:
        return None
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError):
        if source.stream or not _downloaded(source):
            raise
        return None


@contextmanager
def as_user_error(source: Source) -> Iterator[None]:
    """Turn whatever `datasets` and the hub's client raise into a UserError of one line."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except (RepositoryNotFoundError, DatasetNotFoundError) as error:
        raise source.error(
            f"no data set {source.hub} on the hub, or it needs a login (`hf auth login`), and no "
            f"local folder or file of that name"
        ) from error
    except HfHubHTTPError as error:
        raise source.error(f"the hub refused: {_line(error)}; try again later") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise source.error(
            f"the hub can't be reached ({_line(error)}); check the network, or the path if a local "
            f"folder or file is meant"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise source.error(f"can't be loaded: {_line(error)}") from error


def _single_file(source: Source, split: str) -> tuple[str, str]:
    if split == "train":
        return "train", source.train_file
    return "validation", source.test_file


def _split(source: Source, split: str, names: list[str]) -> str:
    """Return the name of the hub's split for `train` or `test`."""
    candidates = [*TESTS, "train"] if split == "test" else ["train"]
    if source.split:
        candidates = [source.split]
    for name in candidates:
        if name in names:
            return name
    raise source.error(
        f"no split {candidates[0]!r}; there are: {_closest(candidates[0], names)}; name one as "
        f"{source.hub}:{source.config or ''}:SPLIT"
    )


def _text(source: Source, row: dict, number: int) -> str:
    """Return the text of a row. Raises UserError if it has none."""
    if source.column not in row:
        raise source.error(f"no column {source.column!r}; there are: {', '.join(row)}")
    text = row[source.column]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise source.error(f"row {number}: column {source.column!r} holds {kind}, not text")
    return text


def _check_config(source: Source, commit: str) -> None:
    """Raise UserError if the set needs a config, or has none of the given name."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name

    names = get_dataset_config_names(source.hub, revision=commit)
    if source.config and source.config not in names:
        listed = _closest(source.config, names)
        raise source.error(f"no config {source.config!r}; there are: {listed}")
    if not source.config and not get_dataset_default_config_name(source.hub, revision=commit):
        listed = _closest("", names)
        raise source.error(f"needs a config: {listed}; name one as {source.hub}:CONFIG")


def _downloaded(source: Source) -> bool:
    """Return whether any part of the set is in the hub's cache on this machine."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return False
    return any(r.repo_type == "dataset" and r.repo_id == source.hub for r in repositories)


def _closest(name: str, names: list[str]) -> str:
    """List all names if they are few, else those most similar to `name` and their number."""
    if len(names) <= 12:
        return ", ".join(names)
    similar = difflib.get_close_matches(name, names, n=8, cutoff=0.3) or names[:8]
    return f"{', '.join(similar)}, ... ({len(names)} in all)"


def _line(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
