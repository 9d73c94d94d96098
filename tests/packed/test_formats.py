"""What is kept and how it is stored, against slow obvious references; the packed linear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import PACKED, needs_kernels
from torch import Tensor, nn
from torch.nn import functional as F

from lib.methods.sparsity import Sparsity
from lib.model.saving import footprint
from lib.packed import layout
from lib.packed import linear as packed_linear
from lib.packed.embedding import dense_rows, quantize_rows
from lib.packed.errors import PackedError
from lib.packed.layout import is_two_of_four, kept_of, row_offsets
from lib.packed.linear import SparseLinear, multiplying

VALUES, INT4 = PACKED[16], PACKED[4]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (3, 65), (2, 200), (7, 129)]
by_shape = pytest.mark.parametrize("shape", SHAPES)
by_bits = pytest.mark.parametrize("bits", [16, 4])


def sparse(rows: int, columns: int, share: float = 0.5, dtype=torch.float32, seed: int = 0):
    """A random matrix with about this share of zeros."""
    torch.manual_seed(seed)
    return torch.randn(rows, columns).to(dtype).masked_fill_(torch.rand(rows, columns) < share, 0)


def slow_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loops over every weight, straight from the description of the form."""
    rows, columns = weight.shape
    mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    kept = []
    for row in range(rows):
        for j, value in enumerate(weight[row]):
            if value != 0:
                mask[row, j // 8] += 2 ** (j % 8)
                kept.append(value)
    return mask, torch.stack(kept) if kept else weight.new_empty(0)


@by_shape
def test_packing_is_what_it_says_and_comes_back(shape: tuple[int, int]) -> None:
    for share in (0, 0.3, 0.7, 1):
        for dtype in (*FLOATS, torch.float64):
            weight = sparse(*shape, share, dtype)
            packed = VALUES.encode(weight)
            mask, values = slow_pack(weight)
            assert torch.equal(packed.mask, mask) and torch.equal(packed.weight, values)
            assert packed.weight.dtype == dtype and packed.scale is None
            assert torch.equal(VALUES.decode(packed, shape[1]), weight)
            assert torch.equal(kept_of(mask, shape[1]), weight != 0)
            assert row_offsets(mask).tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()]
            assert not VALUES.problem(packed, shape[1], len(values))
            size = VALUES.nbytes(*shape, len(values), itemsize=dtype.itemsize)
            assert size == mask.nbytes + values.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_every_kind_come_back(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[0, inf, 0, -inf, 0, 0, nan, 0, 3], [1, 0, 0, 0, 0, 0, 0, 0, 0]])
    again = VALUES.decode(VALUES.encode(weight.to(dtype)), 9)
    assert torch.equal(again.nan_to_num(5, 6, 7), weight.to(dtype).nan_to_num(5, 6, 7))
    signed = VALUES.encode(torch.tensor([[-0.0, 0.0, 2.0, -0.0]], dtype=dtype))
    assert signed.weight.tolist() == [2] and not VALUES.decode(signed, 4).signbit().any()


def test_two_of_four_is_told_from_every_byte() -> None:
    halves = [(byte & 15, byte >> 4) for byte in range(256)]
    fits = [max(one.bit_count(), other.bit_count()) <= 2 for one, other in halves]
    masks = torch.arange(256, dtype=torch.uint8)[:, None, None]
    assert [is_two_of_four(mask) for mask in masks] == fits


@pytest.mark.parametrize("fmt", [VALUES, INT4])
def test_tiles_strides_and_parts_change_nothing(fmt, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(50, 44)
    weight[1], weight[4] = 7, 0
    whole = fmt.encode(weight)
    dense = fmt.decode(whole, 44)
    monkeypatch.setattr(layout, "TILE_WEIGHTS", 100)
    wider = torch.cat([weight, weight[:, :3]], 1)[:, :44]
    for tensor in (weight, weight.T.contiguous().T, wider):
        again = fmt.encode(tensor)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert torch.equal(fmt.decode(whole, 44), dense)
    for rows in (slice(3, 17), slice(0, 1), slice(49, 50), slice(7, 7)):
        part = fmt.decode(whole, 44, row_offsets(whole.mask), rows=rows)
        assert torch.equal(part, dense[rows])


# --- four bits


def short_scales(least: float, most: float) -> list[float]:
    """Every number with five significant bits from `least` to `most`."""
    numbers = (2.0**e * (1 + m / 16) for e in range(-40, 10) for m in range(16))
    return [number for number in numbers if least <= number <= most]


def slow_error(weights: Tensor, scale: float, costs: Tensor) -> float:
    codes = torch.tensor([min(7, max(-8, round(w / scale))) for w in weights.tolist()])
    return float((costs * (codes * scale - weights.double()).square()).sum())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("width", [5, 70])
def test_the_scale_with_the_least_error_is_taken(width: int, weighed: bool) -> None:
    weight = sparse(3, width)
    costs = torch.logspace(-3, 3, width)[torch.randperm(width)] if weighed else torch.ones(width)
    scales = INT4.fit_scales(weight, costs=costs if weighed else None)
    dense = INT4.round_to(weight, scales)
    for row in range(3):
        for begin in range(0, width, 64):
            here = slice(begin, begin + 64)
            weights, counted = weight[row, here], costs[here].double()
            largest = float(weights.abs().max())
            tried = short_scales(largest / 12, largest / 4) if largest else [1.0]
            best = min(slow_error(weights, scale, counted) for scale in tried)
            error = float((counted * (dense[row, here] - weights).square()).sum())
            assert error <= best * (1 + 1e-4) + 1e-12
            assert float(scales[row, begin // 64]) in short_scales(0, 100)
    plain = INT4.round_to(weight, INT4.fit_scales(weight)) - weight
    for factor in (1e-30, 1e-18, 1e18, 1e30):  # squares of such numbers are none
        scaled = weight * factor
        error = INT4.round_to(scaled, INT4.fit_scales(scaled)) / factor - weight
        assert error.norm() < 1.05 * plain.norm()
    assert INT4.fit_scales(torch.tensor([[0.0, 0.0], [1e-44, 0.0]])).float().min() > 0


@by_shape
def test_four_bits_come_back_exactly_in_every_dtype(shape: tuple[int, int]) -> None:
    """What was measured with rounded weights is what is packed, bit for bit: also by scales that
    are not the nearest, as after training, when weights have moved since they were fitted."""
    for share in (0.0, 0.5, 0.9):
        weight = sparse(*shape, share)
        packed = INT4.encode(weight)
        dense = INT4.decode(packed, shape[1])
        nnz = int(weight.count_nonzero())
        assert not INT4.problem(packed, shape[1], nnz)
        assert sum(part.nbytes for part in packed) == INT4.nbytes(*shape, nnz)
        assert torch.equal(dense, INT4.round_to(weight, packed.scale))
        assert torch.equal(packed.mask, VALUES.encode(weight).mask)  # what rounds to 0 is kept
        for dtype in FLOATS:
            assert torch.equal(dense.to(dtype).float(), dense)  # no dtype loses a bit
            assert torch.equal(INT4.decode(INT4.encode(dense.to(dtype)), shape[1]), dense)
    weight = sparse(*shape)
    scales = INT4.fit_scales(weight)
    moved = weight * (1 + 0.3 * sparse(*shape, 0.0, seed=100).tanh())
    dense = INT4.round_to(moved, scales)
    step = scales.float().repeat_interleave(64, 1)[:, : shape[1]]
    off = (dense - moved.clamp(-8 * step, 7 * step)).abs()
    assert bool((off <= 0.501 * step).all())
    for dtype in FLOATS:
        packed = INT4.encode(dense.to(dtype), scales)
        assert torch.equal(packed.scale, scales)
        assert torch.equal(INT4.decode(packed, shape[1]), dense)


def test_two_values_stand_in_a_byte_the_first_in_its_low_bits() -> None:
    weight = torch.tensor([[1.0, 0, -1, 7], [0, -8, 0, 0]])
    packed = INT4.encode(weight)
    assert packed.scale.flatten().tolist() == [1, 1]
    assert packed.weight.tolist() == [1 | 15 << 4, 7 | 8 << 4]


def test_rows_of_eight_bits_are_off_by_half_a_step_and_come_back() -> None:
    for shape in SHAPES:
        weight = sparse(*shape)
        codes, scale = quantize_rows(weight)
        largest, step = weight.abs().amax(1), scale[:, None]
        torch.testing.assert_close(scale[largest > 0], largest[largest > 0] / 127)
        assert ((codes.double() * step - weight).abs() <= step * (0.5 + 1e-5)).all()
        dense = dense_rows(codes, scale)
        assert torch.equal(dense_rows(*quantize_rows(dense)), dense)
    for quantize in (INT4.encode, INT4.fit_scales, quantize_rows):
        for value in (float("nan"), float("inf")):
            with pytest.raises(PackedError):
                quantize(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize(
    "bits, part, change, word",
    [
        (16, "mask", lambda t: t[1, 1].add_(32), "beyond the row's 13"),
        (4, "mask", lambda t: t[1, 1].add_(32), "beyond the row's 13"),
        (16, "mask", lambda t: t[1, 0].bitwise_xor_(1), "mask keeps"),
        (4, "mask", lambda t: t[0, 0].bitwise_xor_(1), "mask keeps"),
        (4, "weight", lambda t: t[-1].bitwise_or_(16), "after its last"),
        (4, "scale", lambda t: t[1].zero_(), "above 0"),
        (4, "scale", lambda t: t[2].fill_(float("nan")), "not finite"),
        (4, "scale", lambda t: t.fill_(1 + 2**-7), "five significant bits"),
    ],
)
def test_what_is_damaged_is_told(bits: int, part: str, change, word: str) -> None:
    weight = sparse(3, 13)
    weight[2, 12] = 0 if weight[2, :12].count_nonzero() + weight[:2].count_nonzero() & 1 else 1
    fmt, nnz = PACKED[bits], int(weight.count_nonzero())
    packed = fmt.encode(weight)
    assert nnz % 2 and not fmt.problem(packed, 13, nnz)
    change(getattr(packed, part))
    assert word in fmt.problem(packed, 13, nnz)


# --- the packed linear and its paths, against the dense one; kernels have tests of their own


def dense_linear(columns: int = 40, bias: bool = True, dtype=torch.float32, share: float = 0.5):
    """Any pattern; whole numbers, so that sums are exact in every dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, 24, bias=bias, dtype=dtype).requires_grad_(False)
    weight = torch.randint(-9, 10, (24, columns))
    linear.weight.data = weight.masked_fill(torch.rand(24, columns) < share, 0).to(dtype)
    return linear


def two_of_four_linear() -> nn.Linear:
    linear = dense_linear(share=0)
    linear.weight[Sparsity.parse("2:4", 0.5).mask(torch.rand(24, 40))] = 0
    return linear


def from_linear(linear: nn.Linear, bits: int) -> SparseLinear:
    return SparseLinear.from_linear(linear, PACKED[bits])


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("dtype", FLOATS)
@by_bits
def test_linear_equals_dense(dtype: torch.dtype, bits: int, monkeypatch) -> None:
    for columns, bias in ((40, True), (43, False)):
        dense = dense_linear(columns, bias, dtype)
        if bits == 4:
            dense.weight.data = INT4.round_to(dense.weight, INT4.fit_scales(dense.weight)).to(dtype)
        packed = from_linear(dense, bits)
        assert packed.dtype == dtype and torch.equal(packed.dense(), dense.weight)
        for shape in ((columns,), (3, columns), (2, 3, columns), (2, 1, 3, columns), (0, columns)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(packed(x), dense(x))
        with monkeypatch.context() as patch:
            patch.setattr(packed_linear, "TILE_WEIGHTS", 100)  # several tiles
            x = torch.randn(2, 3, columns).to(dtype)
            torch.testing.assert_close(packed(x), dense(x))
            mixed = torch.randn(5, 2, columns).to(dtype).transpose(0, 1)  # no view makes rows of it
            torch.testing.assert_close(packed(mixed), dense(mixed))
        assert torch.equal(packed.to_dense().weight, dense.weight)


@pytest.mark.usefixtures("without_kernels")
@by_bits
def test_casts_copies_and_state(bits: int) -> None:
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


@pytest.mark.usefixtures("without_kernels")
@by_bits
def test_torchs_tensor_takes_the_place_of_the_packed_ones(bits: int, monkeypatch) -> None:
    build = lambda dense, bias: dense.clone().as_subclass(StandIn)  # noqa: E731
    monkeypatch.setattr(packed_linear, "two_of_four", build)
    linear = two_of_four_linear()
    if bits == 4:  # of the kept weights some are rounded to 0, and stay marked as kept
        linear.weight /= 1 + 99 * (torch.rand_like(linear.weight) < 0.3)
    packed = from_linear(linear, bits)
    dense, size = packed.to_dense(), footprint(packed)
    assert (int(torch.count_nonzero(dense.weight)) < packed.nnz) == (bits == 4)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
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
        state = act()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert packed.semi_structured is None and footprint(packed) == size
    packed.semi_structure_()
    assert packed.to(torch.bfloat16).dtype == packed.to_dense().weight.dtype == torch.bfloat16


@pytest.mark.usefixtures("without_kernels")
@by_bits
def test_torchs_error_is_the_reason(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


@by_bits
def test_by_the_kernels_where_they_can_be_used(bits: int) -> None:
    needs_kernels()
    dense = dense_linear()
    packed, x = from_linear(dense, bits), torch.randn(2, 3, 40)
    product = packed(x)
    assert packed(x[0, 0]).shape == (24,) and packed(x[:0]).shape == (0, 3, 24)
    expected = F.linear(x, packed.dense(), dense.bias)
    torch.testing.assert_close(product, expected)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), product)
    with multiplying(packed, "decoding"):
        torch.testing.assert_close(packed(x), product)
    with multiplying(packed, "dense"):
        assert torch.equal(packed(x), expected)
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(x.clone().requires_grad_())
    half = packed.to(torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(half, product, rtol=0.1, atol=0.5)
    assert packed.double()(x.double()).dtype == torch.float64  # which they don't know
    packed.float().weight = nn.Parameter(packed.weight.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="not in memory"):  # it is offloaded
        packed(x)
