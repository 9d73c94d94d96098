"""The packed linear and its paths, against the dense one."""

import copy
import pickle

import pytest
import torch
from support import needs_kernels
from torch import nn
from torch.nn import functional as F

from lib.methods.sparsity import Sparsity
from lib.model.pretrained import footprint
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


def two_of_four_linear(rows=24, columns=40):
    linear = dense_linear(rows, columns, share=0)
    linear.weight[Sparsity.parse("2:4", 0.5).mask(torch.rand(rows, columns))] = 0
    return linear


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


class StandIn(torch.Tensor):
    """Stands for torch's 2:4 tensor, which a CPU does not make; tests/cuda has the real ones."""

    meta = None
    packed = property(lambda self: self.to_dense()[:, ::2])

    def to_dense(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("bits", BITS)
def test_torchs_tensor_takes_the_place_of_the_packed_ones(bits, monkeypatch):
    build = lambda dense, bias: dense.clone().as_subclass(StandIn)  # noqa: E731
    monkeypatch.setattr(packed_linear, "two_of_four", build)
    linear = two_of_four_linear()
    if bits == 4:  # of the kept weights some are rounded to 0, and stay marked as kept
        linear.weight /= 1 + 99 * (torch.rand_like(linear.weight) < 0.3)
    packed = from_linear(linear, bits)
    dense, size = packed.to_dense(), footprint(packed)
    assert (int(torch.count_nonzero(dense.weight)) < packed.nnz) == (bits == 4)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}

    def as_before(state):
        return state.keys() == before.keys() and all(
            torch.equal(state[name], tensor) for name, tensor in before.items()
        )

    for act in (
        lambda: packed.state_dict(),
        lambda: copy.deepcopy(packed).state_dict(),
        lambda: pickle.loads(pickle.dumps(packed)).state_dict(),
        lambda: packed.to("cpu").state_dict(),
        lambda: packed.load_state_dict(before) and packed.state_dict(),
    ):
        assert packed.semi_structure_() and packed.semi_structured is not None
        for shape in [(3, 40), (40,), (5, 2, 40), (0, 40)]:
            x = torch.randn(shape)
            torch.testing.assert_close(packed(x), dense(x))
        with multiplying(packed, "dense"):
            torch.testing.assert_close(packed(x), dense(x))
        assert torch.equal(packed.to_dense().weight, dense.weight)
        assert packed.semi_structured is not None
        torchs, at_4 = 24 * 20 * 4, size if bits == 4 else packed.bias.nbytes
        assert footprint(packed) == torchs + at_4
        assert as_before(act())
        assert packed.semi_structured is None and footprint(packed) == size
    packed.semi_structure_()
    assert packed.to(torch.bfloat16).dtype == packed.to_dense().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_torchs_error_is_the_reason(bits, monkeypatch):
    fine = from_linear(two_of_four_linear(), bits)
    assert not fine.semi_structure_() and "Only CUDA tensors" in fine.refused
    other = from_linear(dense_linear(), bits)
    assert not other.semi_structure_() and other.refused == "not 2:4"
    fine.to("cpu")  # any move: another device may take it
    fine._hf_hook = type("Hook", (), {"offload": True})()  # as accelerate's
    assert not fine.semi_structure_() and fine.refused == "offloaded"
    wrong = lambda dense: (dense + 1).as_subclass(StandIn)  # noqa: E731
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", wrong)
    del fine.to("cpu")._hf_hook
    assert not fine.semi_structure_() and "another matrix" in fine.refused
    x = torch.randn(3, 40)
    assert torch.equal(fine(x), fine.to_dense()(x)) and fine.state_dict()


@pytest.mark.parametrize("bits", BITS)
def test_by_the_kernels_where_they_can_be_used(bits, monkeypatch):
    monkeypatch.undo()
    needs_kernels()
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
