"""Costs are measured on few tokens."""

import pytest


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.vocabulary.cost.MOST", 512)
