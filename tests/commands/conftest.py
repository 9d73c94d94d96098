"""What the tests of commands share."""

from __future__ import annotations

from importlib import import_module

import pytest

from lib.commands import compress, languages, sweep
from lib.util import command


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands start others in this process, where torch is imported already."""

    def call(module: str, *argv: object) -> int:
        return command.run(import_module(module).main, [str(each) for each in argv])

    for module in (compress, languages, sweep):
        monkeypatch.setattr(module, "call", call)
