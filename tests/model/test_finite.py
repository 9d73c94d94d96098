"""Weights and activations that are not finite are found."""

import pytest
import tiny
import torch
from support import runner_of

from lib.model.matrix import all_finite
from lib.util.errors import UserError


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights(value: float) -> None:
    model = tiny.tiny_llama()
    runner_of(model).check_finite()
    model.model.layers[1].self_attn.o_proj.weight.data[5, 3] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.o_proj holds nan or inf"):
        runner_of(model).check_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_sees_every_kind(dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([[-largest, 0.0, largest]], dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not all_finite(torch.tensor([[1.0, bad], [2.0, 3.0]], dtype=dtype))
