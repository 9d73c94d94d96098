"""Texts in two languages, and a converter that starts quickly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
