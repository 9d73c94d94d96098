"""Hugging Face Hub datasets, downloaded or streamed, with one-line errors.

`datasets` downloads small datasets once and caches them. Large ones are streamed, so that a few
windows cost a few megabytes. The current commit is looked up first, and that revision is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..util.errors import UserError, hub_problem
from .chats import COLUMNS, Document
from .languages import codes_of
from .sources import Source, text_of

TEST_DOCUMENTS = 1_100  # the first documents of a large dataset are its test text
TIMEOUT = 10.0  # seconds until the Hub's first answer
TESTS = ("test", "validation")


@dataclass(frozen=True)
class HubTexts:
    """The texts of a dataset, from row `first` on; `location` identifies where they come from.

    Downloaded texts are read from disk one at a time, streamed texts in the order of the stream.
    """

    source: Source
    rows: Any
    first: int
    location: object

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Document:
        return self._text(self.rows[row], row)

    def __iter__(self) -> Iterator[Document]:
        count = 0
        with _as_user_error(self.source):
            for count, row in enumerate(self.rows, start=1):
                text = self._text(row, count - 1)
                if count > self.first:
                    yield text
        if count <= self.first:
            split = f"{self.source.hub}:{self.source.config or ''}:SPLIT"
            raise self.source.error(
                f"it holds {count} rows, and the first {self.first} are the test",
                f"Name another dataset, or a split as {split}",
            )

    def _text(self, row: dict, number: int) -> Document:
        """Return the text of a row, "" for null. Raises UserError for another type."""
        return text_of(self.source, row, f"row {number}") or ""


@cache
def load(source: Source, split: str) -> tuple[HubTexts, str | None]:
    """Return the texts of a split (`train` or `test`) and their commit, None if unknown.

    In a dataset without test and validation split the first `TEST_DOCUMENTS` rows are the test, and
    calibration starts after them, unless the user names the split.
    """
    from datasets import load_dataset

    with _as_user_error(source):
        commit = _revision(source)
        options = {"revision": commit, "streaming": source.stream}
        if source.train_file:
            train, test = {"train": source.train_file}, {"validation": source.test_file}
            options["data_files"] = train if split == "train" else test
        sets = load_dataset(source.hub, *filter(None, [source.config]), **options)
        names = ["train"] if split == "train" else [*TESTS, "train"]
        names = [source.split] if source.split else names
        name = next((name for name in names if name in sets), None)
        if name is None:
            raise source.error(
                f"it has no split {names[0]!r}, only {', '.join(sets)}",
                f"Name one as {source.hub}:{source.config or ''}:SPLIT",
            )
        rows = sets[name]
        if source.language:
            codes = codes_of(source.language)
            rows = rows.filter(lambda row: row["language_code"] in codes)
        columns = rows.column_names  # None for streamed files without a schema
        if columns and source.column not in columns and not COLUMNS.intersection(columns):
            text_of(source, dict.fromkeys(columns), source.hub)  # raises the error
        parted = split == "train" and not (source.split or any(t in sets for t in TESTS))
        first = TEST_DOCUMENTS if source.stream and parted else 0
        location = (source.hub, source.config, options.get("data_files", {}).get(name), name, first)
        if not (source.stream or len(rows)):
            raise source.error(f"the split {name!r} is empty", "Name another")
        return HubTexts(source, rows, first, location), commit


def _revision(source: Source) -> str | None:
    """Return the current commit of a Hub dataset.

    Returns None in offline mode, and if the Hub cannot be reached but the dataset was downloaded
    earlier; `datasets` then uses its cache. The request is made here because the retries of
    `datasets` take half a minute to fail.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(source.hub, timeout=TIMEOUT).sha
    except OfflineModeIsEnabled:
        return None
    except (HTTPError, OSError) as error:
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{source.hub.replace('/', '--')}"
        if isinstance(error, HfHubHTTPError) or source.stream or not folder.is_dir():
            raise
        return None


@contextmanager
def _as_user_error(source: Source) -> Iterator[None]:
    """Convert errors of `datasets` and the Hub's client to a UserError of one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except UserError:
        raise
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # lists the configs if one is missing
        fix = f"Name a config as {source.hub}:CONFIG" if "onfig" in reason else "Name another"
        unknown = f"it cannot be loaded ({reason.rstrip('.')})", fix
        is_a_path = source.text.startswith(source.hub)  # or was meant as one
        tried = "no such file or folder is here, and " * is_a_path
        problem, fix = hub_problem(error, "dataset", tried) or unknown
        if source.config and f"'{source.config}' not found" in reason:
            problem, fix = f"{source.hub} has no {source.config}", "Name another"
        raise source.error(problem, fix) from error
