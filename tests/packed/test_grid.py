"""Integers with scales, against slow obvious references: rounding, exactness, groups, masks."""

import pytest
import torch

from lib.packed.errors import PackedError
from lib.packed.grid import GROUPS, dequantise, group_size, has_short_scales, n_groups, quantise
from lib.packed.layout import Packed, pack, packed_bytes, packed_shapes, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 8), (5, 40), (4, 64), (3, 65), (2, 200), (7, 129)]


def random_matrix(rows, width, share=0.5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, width).masked_fill(torch.rand(rows, width) < share, 0)


def short_scales(least, most):
    """Every number with five significant bits from `least` to `most`."""
    exponents = range(-40, 10)
    numbers = (2.0**e * (1 + m / 16) for e in exponents for m in range(16))
    return [number for number in numbers if least <= number <= most]


def slow_error(weights, scale, costs):
    codes = torch.tensor([min(7, max(-8, round(w / scale))) for w in weights.tolist()])
    return float((costs * (codes * scale - weights.double()).square()).sum())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("width", [5, 64, 70])
def test_the_scale_with_the_least_error_is_taken(width, weighed):
    weight = random_matrix(3, width)
    costs = torch.logspace(-3, 3, width)[torch.randperm(width)] if weighed else torch.ones(width)
    codes, scales = quantise(weight, costs=costs if weighed else None)
    dense = dequantise(codes, scales, 64)
    for row in range(3):
        for index, begin in enumerate(range(0, width, 64)):
            here = slice(begin, begin + 64)
            weights, counted = weight[row, here], costs[here].double()
            largest = float(weights.abs().max())
            tried = short_scales(largest / 12, largest / 4) if largest else [1.0]
            best = min(slow_error(weights, scale, counted) for scale in tried)
            error = float((counted * (dense[row, here] - weights).square()).sum())
            assert error <= best * (1 + 1e-4) + 1e-12
            assert has_short_scales(scales[row, index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_come_back_exactly_in_every_dtype(shape, share, group, dtype):
    """What was measured with dequantised weights is what is packed, bit for bit."""
    weight = random_matrix(*shape, share)
    codes, scales = quantise(weight, weight == 0, 4, group)
    assert codes.dtype == torch.int8 and codes.shape == shape
    assert -8 <= codes.min() and codes.max() <= 7
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (shape[0], n_groups(shape[1], group))
    dense = dequantise(codes, scales, group)
    assert torch.equal(dense.to(dtype).float(), dense)  # no dtype loses a bit
    again = dequantise(*quantise(dense.to(dtype), None, 4, group), group)
    assert torch.equal(again, dense)
    assert torch.equal(unpack(pack(dense.to(dtype), 4, group), shape[1]), dense)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_come_back_exactly(shape):
    for seed in range(20):
        codes, scales = quantise(random_matrix(*shape, seed=seed), None, 8)
        assert scales.dtype == torch.float32 and scales.shape == (shape[0], 1)
        dense = dequantise(codes, scales)
        assert torch.equal(dequantise(*quantise(dense, None, 8)), dense)
        assert torch.equal(unpack(pack(dense, 8), shape[1]), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_by_scales_that_are_not_the_nearest(shape, bits, dtype):
    """As after training, when weights have moved since their scales were fitted."""
    for seed in range(10):
        weight = random_matrix(*shape, seed=seed)
        _, scales = quantise(weight, None, bits)
        moved = weight * (1 + 0.3 * random_matrix(*shape, 0.0, seed=seed + 100).tanh())
        codes, same = quantise(moved, None, bits, scales=scales)
        assert torch.equal(same, scales)
        dense = dequantise(codes, scales, 64 if bits == 4 else None)
        clipped = codes.abs() >= (7 if bits == 4 else 127)
        step = scales.float().repeat_interleave(64 if bits == 4 else shape[1], 1)[:, : shape[1]]
        assert bool((((dense - moved).abs() <= 0.501 * step) | clipped).all())
        held = dense.to(dtype)
        assert torch.equal(quantise(held, None, bits, scales=scales)[0], codes)
        packed = pack(held, bits, scales=scales)
        assert torch.equal(packed.scale.view_as(scales), scales)
        assert torch.equal(unpack(packed, shape[1]), dense)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_pruned_does_not_count(bits):
    weight, mask = random_matrix(6, 100, share=0), torch.rand(6, 100) < 0.5
    codes, scales = quantise(weight, mask, bits)
    expected = quantise(weight.masked_fill(mask, 0), None, bits)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert (codes[mask] == 0).all()
    everything = torch.zeros_like(mask)
    assert torch.equal(quantise(weight, everything, bits)[0], quantise(weight, None, bits)[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_with_nothing_or_next_to_nothing(bits):
    weight = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [-3e38, 1.0]])
    codes, scales = quantise(weight, None, bits)
    assert scales.isfinite().all() and (scales > 0).all() and not codes[0].any()
    assert dequantise(codes, scales).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_integers_can_not_hold(bits, value):
    with pytest.raises(PackedError, match=f"{bits} bits: a weight is nan or inf"):
        quantise(torch.tensor([[1.0, value]]), None, bits)
    with pytest.raises(PackedError, match="32, 64 or 128"):
        quantise(torch.ones(1, 2), None, 4, 48)


def test_a_group_is_known_by_its_scales():
    for width in range(1, 400):
        for group in GROUPS:
            size = group_size(torch.ones(1, n_groups(width, group)), width)
            assert [i // size for i in range(width)] == [i // group for i in range(width)]
    with pytest.raises(PackedError, match="9 scales for 10 inputs"):
        group_size(torch.ones(1, 9), 10)


@pytest.mark.parametrize("share, most", [(0.5, 3.3), (0.7, 2.5)])
def test_bits_of_a_weight(share, most):
    """Of linears of a small model: the mask, half a byte for each kept weight, and the scales."""
    for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        weight = random_matrix(*shape, share)
        packed = pack(weight, 4)
        size = sum(part.nbytes for part in packed)
        nnz = int(weight.count_nonzero())
        assert size == packed_bytes(*shape, nnz, 4)
        assert 8 * size / weight.numel() <= most
        shapes = packed_shapes(*shape, nnz, 4)
        assert shapes == {n: tuple(getattr(packed, n).shape) for n in Packed._fields}


def test_two_values_stand_in_a_byte_the_first_in_its_low_bits():
    weight = torch.tensor([[1.0, 0, -1, 7], [0, -8, 0, 0]])
    packed = pack(weight, 4)
    assert packed.scale.flatten().tolist() == [1, 1]
    assert packed.weight.tolist() == [1 | 15 << 4, 7 | 8 << 4]
    assert torch.equal(unpack(packed, 4), weight)
