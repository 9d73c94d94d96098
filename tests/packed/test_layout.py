"""The packed form of any pattern, at 16 and at 8 bits, against slow obvious references."""

import pytest
import torch

from lib.methods.sparsity import n_of_m
from lib.packed import layout
from lib.packed.errors import PackedError
from lib.packed.grid import quantise
from lib.packed.layout import (
    Packed,
    check_packed,
    is_smaller_packed,
    is_two_of_four,
    kept_of,
    pack,
    packed_bytes,
    packed_shapes,
    row_offsets,
    unpack,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 8), (5, 13), (7, 20), (16, 64), (9, 100), (2, 7)]


def sparse(rows, columns, dtype=torch.float32, share=0.5, seed=0):
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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_what_it_says_and_comes_back(dtype, share, shape):
    weight = sparse(*shape, dtype, share)
    packed = pack(weight)
    mask, values = slow_pack(weight)
    assert torch.equal(packed.mask, mask) and torch.equal(packed.weight, values)
    assert packed.weight.dtype == dtype and packed.scale is None
    assert torch.equal(unpack(packed, shape[1]), weight)
    assert torch.equal(kept_of(mask, shape[1]), weight != 0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (weight != 0).sum(1).cumsum(0)])
    assert torch.equal(row_offsets(mask), offsets)
    shapes = packed_shapes(*shape, len(values), 16)
    assert shapes == {"mask": tuple(mask.shape), "weight": tuple(values.shape)}
    size = packed_bytes(*shape, len(values), itemsize=dtype.itemsize)
    assert size == mask.nbytes + values.nbytes
    check_packed(packed, *shape, 16)


def test_every_byte():
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    weight = bits * torch.arange(1.5, 9.5)  # (256, 8)
    mask, values, _ = pack(weight)
    assert mask.flatten().tolist() == list(range(256))
    assert torch.equal(unpack(Packed(mask, values), 8), weight)
    halves = [(byte & 15, byte >> 4) for byte in range(256)]
    fits = [max(one.bit_count(), other.bit_count()) <= 2 for one, other in halves]
    assert [is_two_of_four(mask[byte : byte + 1]) for byte in range(256)] == fits


def test_rows_without_a_zero_and_rows_without_a_weight():
    weight = sparse(6, 21)
    weight[1], weight[4], weight[5] = 7, 0, 0
    packed = pack(weight)
    assert torch.equal(unpack(packed, 21), weight)
    assert packed.mask[1].tolist() == [255, 255, 31] and not packed.mask[4].any()
    check_packed(packed, 6, 21, 16)
    nothing = pack(torch.zeros(3, 5))
    assert nothing.weight.numel() == 0 and torch.equal(unpack(nothing, 5), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_values(dtype):
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[0, inf, 0, -inf, 0, 0, nan, 0, 3], [1, 0, 0, 0, 0, 0, 0, 0, 0]])
    weight = weight.to(dtype)
    again = unpack(pack(weight), 9)
    assert torch.equal(again.isnan(), weight.isnan())
    assert torch.equal(again.nan_to_num(5, 6, 7), weight.nan_to_num(5, 6, 7))
    smallest = torch.finfo(dtype).smallest_normal
    small = torch.tensor([[0, smallest / 4, 0, -smallest / 2]], dtype=torch.float64).to(dtype)
    assert small.count_nonzero() == 2 and torch.equal(unpack(pack(small), 4), small)
    signed = torch.tensor([[-0.0, 0.0, 2.0, -0.0]], dtype=dtype)  # equal matrices, equal bytes
    for a, b in zip(pack(signed)[:2], pack(signed.abs())[:2], strict=True):
        assert torch.equal(a, b) and a.numel() == b.numel() == 1
    assert not unpack(pack(signed), 4).signbit().any()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tiles_strides_and_parts_change_nothing(bits, monkeypatch):
    weight = sparse(50, 44)
    whole = pack(weight, bits)
    dense = unpack(whole, 44)
    monkeypatch.setattr(layout, "TILE_WEIGHTS", 100)
    wider = torch.cat([weight, weight[:, :3]], 1)[:, :44]
    for tensor in (weight, weight.T.contiguous().T, wider):
        assert all(
            a is b is None or torch.equal(a, b)
            for a, b in zip(pack(tensor, bits), whole, strict=True)
        )
    assert torch.equal(unpack(whole, 44), dense)
    for rows in (slice(3, 17), slice(0, 1), slice(49, 50), slice(7, 7)):
        assert torch.equal(unpack(whole, 44, row_offsets(whole.mask), rows=rows), dense[rows])


def test_what_can_not_be_packed():
    with pytest.raises(PackedError, match="matrix"):
        pack(torch.zeros(4, 4, 4))
    for value in (float("nan"), float("inf")):
        with pytest.raises(PackedError, match="8 bits: a weight is nan or inf"):
            pack(torch.tensor([[1.0, value]]), 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_bits_are_off_by_half_a_step_at_most(shape, dtype):
    weight = sparse(*shape, dtype)
    packed = pack(weight, 8)
    check_packed(packed, *shape, 8)
    assert packed.weight.dtype == torch.int8 and packed.scale.dtype == torch.float32
    assert torch.equal(packed.mask, pack(weight).mask)  # what rounds to 0 is kept all the same
    exact, step = weight.double(), packed.scale.double()[:, None]
    codes = unpack(Packed(packed.mask, packed.weight), shape[1])
    assert torch.equal(codes == 0, (exact / step).round() == 0)
    assert ((codes.double() * step - exact).abs() <= step * (0.5 + 1e-5)).all()
    largest = exact.abs().amax(1)
    torch.testing.assert_close(packed.scale[largest > 0].double(), largest[largest > 0] / 127)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        dense = unpack(packed, shape[1], dtype=out)
        assert torch.equal(dense, (codes.float() * packed.scale[:, None]).to(out))


def test_eight_bits_of_rows_with_nothing_or_next_to_nothing():
    weight = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [-3e38, 1.0]])
    codes, scale = quantise(weight, bits=8)
    assert scale.isfinite().all() and (scale > 0).all()
    assert codes.tolist() == [[0, 0], [0, 0], [-127, 0]]
    check_packed(pack(weight, 8), 3, 2, 8)


def test_where_packing_makes_smaller():
    weight = torch.ones(64, 64)
    assert not is_smaller_packed(weight)
    weight.view(-1)[: 64 * 4] = 0  # what the mask takes
    assert not is_smaller_packed(weight)
    weight.view(-1)[: 64 * 4 + 64 * 4 + 5] = 0  # and what the offsets take
    assert is_smaller_packed(weight) and is_smaller_packed(weight.bfloat16())


def test_two_of_four():
    weight = torch.ones(8, 24)
    weight[n_of_m(torch.rand(8, 24), 2, 4)] = 0
    assert is_two_of_four(pack(weight).mask)
    weight[3, 12:16] = torch.tensor([1.0, 0, 1, 1])
    assert not is_two_of_four(pack(weight).mask)


def undamaged():
    """A 3 x 13 matrix with an odd number of kept weights."""
    weight = sparse(3, 13)
    weight[0, 0], weight[1, 0] = 1, 0
    if weight.count_nonzero() % 2 == 0:
        weight[2, 12] = 0 if weight[2, 12] else 1
    return weight


def damaged(kind, bits=16):
    """A packed 3 x 13 matrix with one thing wrong."""
    packed = pack(undamaged(), bits)
    mask, values, scale = packed.mask.clone(), packed.weight, packed.scale
    if kind == "padding":
        mask[1, 1] |= 1 << 5
    elif kind == "one more":
        mask[1, 0] |= 1
    elif kind == "one less":
        mask[0, 0] &= 254
    elif kind == "mask's shape":
        mask = mask[:, :1]
    elif kind == "mask's dtype":
        mask = mask.int()
    elif kind == "two dimensions":
        values = values[None]
    elif kind == "values' dtype":
        values = values.to(torch.int8) if bits == 16 else values.float()
    elif kind == "no scale":
        scale = None
    elif kind == "scale's shape":
        scale = scale[:2]
    elif kind == "scale 0":
        scale = scale * torch.tensor([1, 0, 1]).view_as(scale)
    elif kind == "scale nan":
        scale = scale * torch.tensor([1, 1, float("nan")]).view_as(scale).to(scale)
    elif kind == "one byte less":
        values = values[:-1]
    elif kind == "scale's dtype":
        scale = scale.float()
    elif kind == "a long scale":
        scale = scale * 0 + torch.tensor(1 + 2**-7, dtype=torch.bfloat16)
    elif kind == "a value too many":
        values = values | 16
    return Packed(mask, values, scale)


@pytest.mark.parametrize(
    ("kind", "bits", "word"),
    [
        ("padding", 16, "bits beyond the row's 13 weights"),
        ("one more", 16, "packed mask keeps"),
        ("one less", 16, "packed mask keeps"),
        ("mask's shape", 16, "packed mask is \\(3, 1\\): a matrix of 3 x 13"),
        ("mask's dtype", 16, "not uint8"),
        ("two dimensions", 16, "packed weight is \\(1, "),
        ("values' dtype", 16, "not 16 bits"),
        ("values' dtype", 8, "not 8 bits"),
        ("no scale", 8, "packed scale is missing"),
        ("scale's shape", 8, "packed scale is \\(2,\\)"),
        ("scale 0", 8, "above 0"),
        ("scale nan", 8, "not finite"),
        ("padding", 4, "bits beyond the row's 13 weights"),
        ("one more", 4, "packed mask keeps"),
        ("mask's shape", 4, "packed mask is \\(3, 1\\): a matrix of 3 x 13"),
        ("one byte less", 4, "packed weight is \\("),
        ("values' dtype", 4, "not 4 bits"),
        ("no scale", 4, "packed scale is missing"),
        ("scale's shape", 4, "packed scale is \\(2, 1\\)"),
        ("scale's dtype", 4, "packed scale is torch.float32, not torch.bfloat16"),
        ("scale 0", 4, "above 0"),
        ("scale nan", 4, "not finite"),
        ("a long scale", 4, "more than five significant bits"),
        ("a value too many", 4, "a value after its last"),
    ],
)
def test_damage_is_one_line(kind, bits, word):
    nnz = len(pack(undamaged()).weight)
    with pytest.raises(PackedError, match=word) as raised:
        check_packed(damaged(kind, bits), 3, 13, bits, nnz)
    assert "\n" not in str(raised.value)
    check_packed(damaged("nothing", bits), 3, 13, bits, nnz)
