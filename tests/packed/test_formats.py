"""What is kept and how it is stored, against slow obvious references."""

import pytest
import torch

from lib.packed import layout
from lib.packed.embedding import dense_rows, quantize_rows
from lib.packed.errors import PackedError
from lib.packed.formats import PACKED
from lib.packed.layout import is_two_of_four, kept_of, row_offsets

VALUES, INT4 = PACKED[16], PACKED[4]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (3, 65), (2, 200), (7, 129)]


def sparse(rows, columns, share=0.5, dtype=torch.float32, seed=0):
    """A random matrix with about this share of zeros."""
    torch.manual_seed(seed)
    return torch.randn(rows, columns).to(dtype).masked_fill_(torch.rand(rows, columns) < share, 0)


def slow_pack(weight):
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


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_what_it_says_and_comes_back(dtype, share, shape):
    weight = sparse(*shape, share, dtype)
    packed = VALUES.encode(weight)
    mask, values = slow_pack(weight)
    assert torch.equal(packed.mask, mask) and torch.equal(packed.weight, values)
    assert packed.weight.dtype == dtype and packed.scale is None
    assert torch.equal(VALUES.decode(packed, shape[1]), weight)
    assert torch.equal(kept_of(mask, shape[1]), weight != 0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (weight != 0).sum(1).cumsum(0)])
    assert torch.equal(row_offsets(mask), offsets)
    assert not VALUES.problem(packed, shape[1], len(values))
    size = VALUES.nbytes(*shape, len(values), itemsize=dtype.itemsize)
    assert size == mask.nbytes + values.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_every_kind_come_back(dtype):
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[0, inf, 0, -inf, 0, 0, nan, 0, 3], [1, 0, 0, 0, 0, 0, 0, 0, 0]])
    again = VALUES.decode(VALUES.encode(weight.to(dtype)), 9)
    assert torch.equal(again.nan_to_num(5, 6, 7), weight.to(dtype).nan_to_num(5, 6, 7))
    signed = VALUES.encode(torch.tensor([[-0.0, 0.0, 2.0, -0.0]], dtype=dtype))
    assert signed.weight.tolist() == [2] and not VALUES.decode(signed, 4).signbit().any()


def test_two_of_four_is_told_from_every_byte():
    halves = [(byte & 15, byte >> 4) for byte in range(256)]
    fits = [max(one.bit_count(), other.bit_count()) <= 2 for one, other in halves]
    masks = torch.arange(256, dtype=torch.uint8)[:, None, None]
    assert [is_two_of_four(mask) for mask in masks] == fits


@pytest.mark.parametrize("fmt", [VALUES, INT4])
def test_tiles_strides_and_parts_change_nothing(fmt, monkeypatch):
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


def short_scales(least, most):
    """Every number with five significant bits from `least` to `most`."""
    numbers = (2.0**e * (1 + m / 16) for e in range(-40, 10) for m in range(16))
    return [number for number in numbers if least <= number <= most]


def slow_error(weights, scale, costs):
    codes = torch.tensor([min(7, max(-8, round(w / scale))) for w in weights.tolist()])
    return float((costs * (codes * scale - weights.double()).square()).sum())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("width", [5, 64, 70])
def test_the_scale_with_the_least_error_is_taken(width, weighed):
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


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_scales_of_numbers_whose_squares_are_none(factor):
    weight = sparse(3, 70)
    error = INT4.round_to(weight * factor, INT4.fit_scales(weight * factor)) / factor - weight
    plain = INT4.round_to(weight, INT4.fit_scales(weight)) - weight
    assert error.norm() < 1.05 * plain.norm()
    assert INT4.fit_scales(torch.tensor([[0.0, 0.0], [1e-44, 0.0]])).float().min() > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_come_back_exactly_in_every_dtype(shape, share, dtype):
    """What was measured with rounded weights is what is packed, bit for bit."""
    weight = sparse(*shape, share)
    packed = INT4.encode(weight)
    dense = INT4.decode(packed, shape[1])
    nnz = int(weight.count_nonzero())
    assert not INT4.problem(packed, shape[1], nnz)
    assert sum(part.nbytes for part in packed) == INT4.nbytes(*shape, nnz)
    assert torch.equal(dense, INT4.round_to(weight, packed.scale))
    assert torch.equal(dense.to(dtype).float(), dense)  # no dtype loses a bit
    assert torch.equal(INT4.decode(INT4.encode(dense.to(dtype)), shape[1]), dense)
    assert torch.equal(packed.mask, VALUES.encode(weight).mask)  # what rounds to 0 is kept


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_come_back_by_scales_that_are_not_the_nearest(shape, dtype):
    """As after training, when weights have moved since their scales were fitted."""
    weight = sparse(*shape)
    scales = INT4.fit_scales(weight)
    moved = weight * (1 + 0.3 * sparse(*shape, 0.0, seed=100).tanh())
    dense = INT4.round_to(moved, scales)
    step = scales.float().repeat_interleave(64, 1)[:, : shape[1]]
    off = (dense - moved.clamp(-8 * step, 7 * step)).abs()
    assert bool((off <= 0.501 * step).all())
    packed = INT4.encode(dense.to(dtype), scales)
    assert torch.equal(packed.scale, scales)
    assert torch.equal(INT4.decode(packed, shape[1]), dense)


def test_two_values_stand_in_a_byte_the_first_in_its_low_bits():
    weight = torch.tensor([[1.0, 0, -1, 7], [0, -8, 0, 0]])
    packed = INT4.encode(weight)
    assert packed.scale.flatten().tolist() == [1, 1]
    assert packed.weight.tolist() == [1 | 15 << 4, 7 | 8 << 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_eight_bits_are_off_by_half_a_step_and_come_back(shape):
    weight = sparse(*shape)
    codes, scale = quantize_rows(weight)
    largest, step = weight.abs().amax(1), scale[:, None]
    torch.testing.assert_close(scale[largest > 0], largest[largest > 0] / 127)
    assert ((codes.double() * step - weight).abs() <= step * (0.5 + 1e-5)).all()
    dense = dense_rows(codes, scale)
    assert torch.equal(dense_rows(*quantize_rows(dense)), dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", [INT4.encode, INT4.fit_scales, quantize_rows])
def test_what_integers_can_not_hold(quantize, value):
    with pytest.raises(PackedError, match="a weight is nan or inf"):
        quantize(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize(
    "bits, part, change, word",
    [
        (16, "mask", lambda t: t[1, 1].add_(32), "mask has bits beyond the row's 13 weights"),
        (4, "mask", lambda t: t[1, 1].add_(32), "mask has bits beyond the row's 13 weights"),
        (16, "mask", lambda t: t[1, 0].bitwise_xor_(1), "mask keeps"),
        (4, "mask", lambda t: t[0, 0].bitwise_xor_(1), "mask keeps"),
        (4, "weight", lambda t: t[-1].bitwise_or_(16), "a value after its last"),
        (4, "scale", lambda t: t[1].zero_(), "above 0"),
        (4, "scale", lambda t: t[2].fill_(float("nan")), "not finite"),
        (4, "scale", lambda t: t.fill_(1 + 2**-7), "more than five significant bits"),
    ],
)
def test_what_is_damaged_is_told(bits, part, change, word):
    weight = sparse(3, 13)
    weight[2, 12] = 0 if weight[2, :12].count_nonzero() + weight[:2].count_nonzero() & 1 else 1
    fmt, nnz = PACKED[bits], int(weight.count_nonzero())
    packed = fmt.encode(weight)
    assert nnz % 2 and not fmt.problem(packed, 13, nnz)
    change(getattr(packed, part))
    assert word in fmt.problem(packed, 13, nnz)
