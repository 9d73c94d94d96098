"""What the tests of reports share: a command's files, and its pictures before they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """{name: what a command draws}; its files are empty, for to draw them takes seconds."""
    drawn: dict[str, Figure] = {}

    def savefig(self: Figure, file: str | Path, **_: object) -> None:
        drawn[Path(file).stem] = self
        Path(file).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn
