"""Models and texts for the command lines of jobs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "llama", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder
