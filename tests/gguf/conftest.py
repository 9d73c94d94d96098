"""Texts in two languages, and a converter that starts quickly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import processes
import pytest
from support import LIMIT

from lib.util.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vocabulary"))

import kinds  # noqa: E402
import tiny  # noqa: E402
import whole  # noqa: E402


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("uk", kinds.UK), ("en", kinds.EN)):
        train, test = kinds.texts(words, 40, 1), kinds.texts(words, 9, 2)
        tiny.write_texts(folder / name, train=train, test=test)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return whole.write_whole(folder, "llama", whole.WIDTHS, kinds.byte_fallback())


@pytest.fixture(scope="session")
def runs() -> Iterator[ProcessPoolExecutor]:
    """A process that runs llama.cpp, file after file; its crash leaves the tests alive."""
    with ProcessPoolExecutor(1, processes.forkserver()) as pool:
        yield pool


@pytest.fixture
def quickly(runs: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter and the reader run here, where torch is imported already."""
    from lib.commands.gguf import convert, llama_cpp, verify

    def here(what: str, function: Callable, size: float = 0, **arguments: object) -> object:
        try:
            if function is llama_cpp.run:
                return runs.submit(function, **arguments).result(LIMIT)
            return function(**arguments)
        except Exception as error:
            raise UserError(f"{what}: {error}") from error

    for caller in (convert, verify):
        monkeypatch.setattr(caller, "run_child", here)
