"""How every optional kernel is admitted: build it, compare its results, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Kernel = TypeVar("Kernel")


def try_kernel(
    build: Callable[[], Kernel], check: Callable[[Kernel], bool]
) -> tuple[Kernel | None, str]:
    """The kernel that `build` returns and an empty string, or None and the reason in one line.

    `check(kernel)` says whether its results are right. Compilers, drivers and libraries raise
    exceptions of all classes, and a missing kernel must never end a run, so all of them are
    reasons.
    """
    try:
        kernel = build()
        return (kernel, "") if check(kernel) else (None, "its results are wrong here")
    except Exception as error:
        return None, one_line(error)


def one_line(error: Exception) -> str:
    """The class of an exception and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
