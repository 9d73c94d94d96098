"""Warnings of a pruning name the linears they belong to, and only those."""

from __future__ import annotations

import warnings

import pytest
import tiny
from support import HALF, prune_

from lib.methods.wanda import Wanda
from lib.util.errors import RunWarning


def test_whose_a_warning_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Wanda.prune_

    def warning(self, weights, sparsity) -> None:
        if len(weights) == 3:  # q, k and v
            warnings.warn("a kernel is missing", RunWarning, stacklevel=2)
            warnings.warn("is singular", stacklevel=2)
        own(self, weights, sparsity)

    monkeypatch.setattr(Wanda, "prune_", warning)
    done = prune_(tiny.tiny_llama(num_hidden_layers=1), "wanda", HALF)
    names = ", ".join(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert done.summary()[1:] == ["a kernel is missing", f"{names}: is singular"]
