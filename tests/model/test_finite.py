"""What is not finite is found."""

import pytest
import torch

from lib.model.matrix import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_sees_every_kind(dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([[-largest, 0.0, largest]], dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not all_finite(torch.tensor([[1.0, bad], [2.0, 3.0]], dtype=dtype))
