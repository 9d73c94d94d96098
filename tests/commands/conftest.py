"""What the tests of commands share."""

from __future__ import annotations

import pytest
from support import call_here

from lib.commands import sweep


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands start others in this process, where torch is imported already."""
    monkeypatch.setattr("lib.util.processes.call", call_here)
    monkeypatch.setattr(sweep, "call", call_here)
