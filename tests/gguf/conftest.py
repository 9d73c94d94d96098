"""Texts in two languages, and a converter that starts quickly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter and the reader run here, where torch is imported already."""
    from lib.commands.gguf import command, llama_cpp, proof

    def here(what: str, function: Callable, **arguments: object) -> object:
        if function is llama_cpp.run:
            return llama_cpp.run_child(what, function, **arguments)
        try:
            return function(**arguments)
        except Exception as error:
            raise UserError(f"{what}: {error}") from error

    for caller in (command, proof):
        monkeypatch.setattr(caller, "run_child", here)
