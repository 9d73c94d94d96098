"""How large the checks are, and what they raise where there is nothing to be checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class NotHere(Exception):
    """What the check needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Size:
    """`small`: for a CPU. `work`: folder for what the checks make. `model`: the user's own."""

    small: bool
    work: str
    model: str | None = None

    def of(self, full: Any, small: Any) -> Any:
        """One of the two."""
        return small if self.small else full
