"""The packed linear and its paths, against the dense one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.packed import kernels
from lib.packed import linear as packed_linear
from lib.packed.formats import PACKED
from lib.packed.linear import SparseLinear, multiplying

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [16, 4]
# the kernels are compared with this path in tests of their own
pytestmark = pytest.mark.usefixtures("without_kernels")


def dense_linear(rows=24, columns=40, bias=True, dtype=torch.float32, share=0.5):
    """Any pattern; whole numbers, so that sums are exact in every dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    weight = torch.randint(-9, 10, (rows, columns)).masked_fill(
        torch.rand(rows, columns) < share, 0
    )
    linear.weight.data = weight.to(dtype)
    return linear.requires_grad_(False)


def from_linear(linear, bits=16):
    return SparseLinear.from_linear(linear, PACKED[bits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [40, 43])
@pytest.mark.parametrize("bits", BITS)
def test_linear_equals_dense(dtype, bias, columns, bits, monkeypatch):
    dense = dense_linear(columns=columns, bias=bias, dtype=dtype)
    if bits == 4:
        scales = PACKED[4].fit_scales(dense.weight)
        dense.weight.data = PACKED[4].round_to(dense.weight, scales).to(dtype)
    packed = from_linear(dense, bits)
    assert packed.dtype == dtype and torch.equal(packed.dense(), dense.weight)
    for shape in ((columns,), (3, columns), (2, 3, columns), (2, 1, 3, columns), (0, columns)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(packed(x), dense(x))
    monkeypatch.setattr(packed_linear, "TILE_WEIGHTS", 100)  # several tiles
    x = torch.randn(2, 3, columns).to(dtype)
    torch.testing.assert_close(packed(x), dense(x))
    mixed = torch.randn(5, 2, columns).to(dtype).transpose(0, 1)  # no view makes rows of it
    torch.testing.assert_close(packed(mixed), dense(mixed))
    assert torch.equal(packed.to_dense().weight, dense.weight)


@pytest.mark.parametrize("bits", BITS)
def test_casts_copies_and_state(bits):
    dense = dense_linear()
    dense.weight /= 127
    packed = from_linear(dense, bits)
    state, scale = packed.state_dict(), packed.scale
    assert set(state) == {"weight", "mask", "bias"} | ({"scale"} if bits < 16 else set())
    for one in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(one.dense(), packed.dense())
        assert torch.equal(one.offsets, packed.offsets) and one.mask is not packed.mask
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.dtype == half.dense().dtype == half.bias.dtype == torch.bfloat16
    assert half.mask.dtype == torch.uint8 and half.offsets.dtype == torch.int64
    if bits < 16:
        assert torch.equal(half.scale, scale) and half.weight.dtype == packed.weight.dtype
        assert torch.equal(half.half().float().scale, scale)
    empty = SparseLinear(dense, packed.nnz, PACKED[bits]).to("meta")
    empty(torch.empty(2, 40, device="meta"))  # shapes alone


@pytest.mark.parametrize("bits", BITS)
def test_by_the_kernels_where_they_can_be_used(bits, monkeypatch):
    monkeypatch.undo()
    if not kernels.ready():
        pytest.skip("no C++ compiler")
    dense = dense_linear()
    packed, x = from_linear(dense, bits), torch.randn(2, 3, 40)
    product = packed(x)
    assert packed(x[0, 0]).shape == (24,) and packed(x[:0]).shape == (0, 3, 24)
    torch.testing.assert_close(product, F.linear(x, packed.dense(), dense.bias))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), product)
    with multiplying(packed, "decoding"):
        torch.testing.assert_close(packed(x), product)
    with multiplying(packed, "dense"):
        assert torch.equal(packed(x), F.linear(x, packed.dense(), dense.bias))
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(x.clone().requires_grad_())
    half = packed.to(torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(half, product, rtol=0.1, atol=0.5)
    assert packed.double()(x.double()).dtype == torch.float64  # which they don't know
    packed.float().weight = nn.Parameter(packed.weight.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="not in memory"):  # it is offloaded
        packed(x)
