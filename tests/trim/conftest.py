"""Costs are measured on few tokens, and models of random weights may cost anything."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def cheap() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.vocabulary.cost.MOST", 512)
        patch.setattr("lib.commands.trim.choosing.MOST_COST", 99.0)
        yield
