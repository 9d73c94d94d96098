"""What the tests of commands share: how a command starts others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import support


@pytest.fixture
def replace_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Replaces `call`, which starts commands in processes of their own."""
    return partial(support.replace_call, monkeypatch)


@pytest.fixture
def in_this_process(replace_call: Callable) -> None:
    """Commands start others in this process, where torch is imported already."""
    replace_call(support.call_here)
