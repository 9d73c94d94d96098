"""Weights and activations that are not finite are found, and the linear is named."""

import pytest
import tiny
import torch
from support import runner_of, windows

from lib.model.finite import all_finite, first_overflow


@pytest.mark.parametrize(
    ("block", "linear", "named"),
    [
        (0, "mlp.down_proj", "model.layers.1.self_attn.q_proj"),
        (1, "mlp.gate_proj", "model.layers.1.mlp.down_proj"),
        (1, "mlp.down_proj", "the output head"),
    ],
)
def test_activations(block: int, linear: str, named: str) -> None:
    model = tiny.tiny_llama()
    weight = model.model.layers[block].get_submodule(linear).weight
    weight.data = weight.data.sign() * 3e38  # finite, but no sum of its products is
    assert first_overflow(runner_of(model), windows(2)) == named
    for module in model.modules():
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_sees_every_kind(dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([[-largest, 0.0, largest]], dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not all_finite(torch.tensor([[1.0, bad], [2.0, 3.0]], dtype=dtype))
