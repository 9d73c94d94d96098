"""Checks at the end of a run, as main.py wires them: each is made to fail by a planted fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, raising

from lib.methods.wanda import Wanda
from lib.packed.linear import SparseLinear

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def given(trained: Path) -> list[object]:
    texts = tiny.write_texts("uk", 20, 4)
    return ["--model", trained, "--prune_method", "wanda", "--calibration_data", texts, *QUICK]


def test_a_packed_product_that_is_wrong_is_noticed(
    given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: 1.05 * own(self, x))
    done = call(*given, "--replace_sparse_layers")
    assert done.status == 1
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    assert "differ" in line and "packed" in line


@pytest.mark.parametrize("kind", ["unstructured", "2:4"])
def test_a_linear_that_falls_short_is_named(
    kind: str, given: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Wanda.prune_

    def lazy(self, weights: list, *rest) -> None:
        if len(weights) == 3:  # q, k and v: all but the last few rows
            kept = [weight[-20:].clone() for weight in weights]
            own(self, weights, *rest)
            for weight, rows in zip(weights, kept, strict=True):
                weight[-20:] = rows[-len(weight[-20:]) :]
        else:
            own(self, weights, *rest)

    monkeypatch.setattr(Wanda, "prune_", lazy)
    done = call(*given, "--sparsity_type", kind)
    assert done.status == 1
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    assert "model.layers.0.self_attn.q_proj" in line
    assert ("0.5 was requested" if kind == "unstructured" else "groups are not 2:4") in line


def test_a_lack_of_memory_is_one_line_with_a_way_out(given: list) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with raising(full, "pruning"):
        done = call(*given)
    assert done.status == 1
    [line] = [line for line in done.complaints if line.startswith("error: ")]
    assert "out of memory" in line and "--batch_size" in line
