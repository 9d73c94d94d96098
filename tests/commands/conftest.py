"""What the tests of commands share: how a command starts others."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from support import call_here, program_of

STARTS = "compress", "sweep", "demo"  # commands that start others


@pytest.fixture
def replace_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Replaces `call`, which starts commands in processes of their own, wherever it is known."""

    def replace(function: Callable[..., int]) -> None:
        for name in STARTS:
            program_of(name)
        for module in [each for name, each in sys.modules.items() if name.startswith("lib.")]:
            own = vars(module).get("call")
            if own in REPLACED or getattr(own, "__module__", "").startswith("lib.util."):
                monkeypatch.setattr(module, "call", function)
        REPLACED.append(function)

    return replace


REPLACED: list[Callable[..., int]] = [call_here]


@pytest.fixture
def in_this_process(replace_call: Callable) -> None:
    """Commands start others in this process, where torch is imported already."""
    replace_call(call_here)
