"""The rounding of kept weights against slow loops over columns and codes, in numpy's float64."""

import numpy
import pytest
import torch
from support import CPU
from torch import Tensor

from lib.methods.least_squares import FLOOR
from lib.methods.rounding import Rounding
from lib.packed.grid import dequantise, quantise

CODES = {8: numpy.arange(-127, 128), 4: numpy.arange(-8, 8)}


def problem(width: int, *outputs: int, tokens: int = 600):
    """Inputs (tokens, in) that have much in common, and weights (out, in), half of them 0."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(width // 8, width, generator=generator)
    x = torch.randn(tokens, width // 8, generator=generator) @ common
    x += torch.randn(tokens, width, generator=generator)
    x *= torch.rand(width, generator=generator) + 0.1
    draw = [torch.randn(2, rows, width, generator=generator) for rows in outputs]
    return x, [weight.masked_fill(chance > 0, 0) for weight, chance in draw]


def drifted(x: Tensor) -> Tensor:
    """The same tokens in another model."""
    generator = torch.Generator().manual_seed(1)
    width = x.shape[1]
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    return x @ mix + 0.1 * torch.randn(x.shape, generator=generator)


def rounded(
    x: Tensor, weights: list[Tensor], dense: Tensor | None = None, **options: object
) -> list[Tensor]:
    method = Rounding(x.shape[1], CPU, **options)
    method.observe(x, dense)
    copies = [weight.clone() for weight in weights]
    method.round_(copies)
    return copies


def scaled_hessian(x: Tensor, damping: float = 6.0):
    """A (in, in), and the norms of the inputs (in,), as lib/methods/least_squares.py says."""
    x = x.double().numpy()
    norms = numpy.sqrt((x**2).sum(0))
    norms[norms == 0] = 1
    hessian = x.T @ x / norms / norms[:, None] + FLOOR * numpy.eye(x.shape[1])
    unexplained = (1 / numpy.diag(numpy.linalg.inv(hessian))).mean()
    return hessian + damping * unexplained * len(norms) / len(x) * numpy.eye(len(norms)), norms


def short_scales(largest: float) -> list[float]:
    """Every number with five significant bits from a twelfth to a quarter of the largest weight."""
    numbers = (2.0**e * (1 + m / 16) for e in range(-30, 10) for m in range(16))
    return [number for number in numbers if largest / 12 <= number <= largest / 4]


def nearest(values, scale: float, bits: int):
    """The nearest of all codes times the scale, for each value."""
    grid = CODES[bits] * scale
    return grid[numpy.abs(grid - numpy.asarray(values)[..., None]).argmin(-1)]


def fitted(weights, norms, bits: int) -> float:
    """The scale of some weights of one row, by trying all."""
    largest = numpy.abs(weights).max()
    if largest == 0:
        return 1.0
    if bits == 8:
        return largest / 127

    def error(scale: float) -> float:
        return ((norms * (nearest(weights, scale, bits) - weights)) ** 2).sum()

    return min(short_scales(largest), key=error)


def reference(x: Tensor, weight: Tensor, bits: int, group: int, sweeps: int):
    """The best values of the columns that are left, whenever one is settled, by the inverse of
    their part of A; then the best code of each weight, by trying all."""
    hessian, norms = scaled_hessian(x)
    ideal, mask = weight.double().numpy() * norms, weight.numpy() == 0
    rows, width = ideal.shape
    group = group if bits == 4 else width
    settled, scales = numpy.zeros_like(ideal), numpy.ones((rows, width))
    for column in range(width):
        free = numpy.linalg.inv(hessian[column:, column:])
        for row in range(rows):
            change = (ideal - settled)[row, :column]
            values = ideal[row, column:] + change @ hessian[:column, column:] @ free
            if column % group == 0:
                here = slice(column, column + group)
                kept = numpy.where(mask[row, here], 0, values[:group]) / norms[here]
                scales[row, here] = fitted(kept, norms[here], bits)
            if not mask[row, column]:
                step = scales[row, column] * norms[column]
                settled[row, column] = nearest(values[0], step, bits)
    for _ in range(sweeps):
        for column in range(width):
            change = settled - ideal
            others = change @ hessian[column] - change[:, column] * hessian[column, column]
            best = ideal[:, column] - others / hessian[column, column]
            for row in numpy.flatnonzero(~mask[:, column]):
                step = scales[row, column] * norms[column]
                settled[row, column] = nearest(best[row], step, bits)
    return settled / norms


def loss(x: Tensor, result, weight: Tensor) -> float:
    """What is minimised, where the aim is the linear's own outputs."""
    hessian, norms = scaled_hessian(x)
    change = (numpy.asarray(result, dtype=float) - weight.double().numpy()) * norms
    return numpy.einsum("oi,ij,oj->", change, hessian, change)


@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize(
    "bits, width, group", [(4, 40, 32), (4, 64, 64), (4, 150, 64), (4, 150, 128), (8, 150, None)]
)
def test_as_column_by_column(bits: int, width: int, group: int | None, sweeps: int) -> None:
    x, [weight] = problem(width, 8)
    options = dict(bits=bits, sweeps=sweeps) | ({"group": group} if group else {})
    [found] = rounded(x, [weight], **options)
    expected = reference(x, weight, bits, group, sweeps)
    same = numpy.isclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert same.mean() > 0.9  # a value between two codes may fall to either, and its row with it
    assert loss(x, found, weight) == pytest.approx(loss(x, expected, weight), rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [24, 64, 200])
def test_outputs_are_nearer_than_those_of_the_nearest_integers(width: int, bits: int) -> None:
    x, [weight] = problem(width, 32)
    [found] = rounded(x, [weight], bits=bits)
    plain = dequantise(*quantise(weight, bits=bits), 64 if bits == 4 else None)

    def error(matrix: Tensor) -> float:
        return (x @ (matrix - weight).T).square().sum().item()

    assert error(found) < 0.5 * error(plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_sweep_lowers_what_is_minimised(bits: int) -> None:
    x, [weight] = problem(150, 24)
    losses = [loss(x, rounded(x, [weight], bits=bits, sweeps=n)[0], weight) for n in range(4)]
    assert losses[0] > losses[1] > losses[2] >= losses[3]


@pytest.mark.parametrize("width", [8, 64, 65, 200])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_and_the_rest_is_on_the_grid(bits: int, width: int) -> None:
    """The values are those that are packed, bit for bit."""
    x, weights = problem(width, 16, 5)
    weights[0][3] = 0  # a row, and a group of others
    weights[1][:, :64] = 0
    for weight, found in zip(weights, rounded(x, weights, bits=bits), strict=True):
        assert bool((found[weight == 0] == 0).all())
        if bits == 4:  # they say which scales they have
            assert torch.equal(dequantise(*quantise(found), 64), found)
        else:  # it is the scale of the weights as they were
            scales = quantise(weight, bits=8)[1]
            again = dequantise(quantise(found, bits=8, scales=scales)[0], scales)
            assert torch.equal(again, found)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_aim_is_what_the_model_computes_before_rounding(bits: int) -> None:
    x, [weight] = problem(96, 24)
    dense = drifted(x)
    [repaired] = rounded(x, [weight], dense, bits=bits)
    [kept] = rounded(x, [weight], dense, bits=bits, blend=0.0)

    def error(matrix: Tensor) -> float:
        return (x @ matrix.T - dense @ weight.T).square().sum().item()

    assert error(repaired) < 0.8 * error(kept)


def test_the_error_of_the_residual_stream_is_an_aim_too() -> None:
    x, [weight] = problem(96, 24)
    dense = drifted(x)
    method = Rounding(96, CPU)
    method.observe(x, residual_error=(dense - x) @ weight.T)
    alone = weight.clone()
    method.round_([alone])
    [expected] = rounded(x, [weight], dense)
    assert torch.isclose(alone, expected).float().mean() > 0.97


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_dead_inputs_are_rounded_by_themselves(bits: int) -> None:
    """No text tells anything of them: they stay, and change no others."""
    x, [weight] = problem(128, 8)
    x[:, 64:] = 0
    [found] = rounded(x, [weight], bits=bits)
    plain = dequantise(*quantise(weight, bits=bits), 64 if bits == 4 else None)
    assert torch.equal(found[:, 64:], plain[:, 64:])
    weight[:, 64:] = 0
    [alone] = rounded(x, [weight], bits=bits)
    if bits == 4:  # at 8 bits they have a say in the scale of the row
        assert torch.equal(found[:, :64], alone[:, :64])


@pytest.mark.parametrize("bits", [4, 8])
def test_linears_that_share_an_input_are_as_each_alone(bits: int) -> None:
    x, weights = problem(150, 24, 8, 40)
    for weight, found in zip(weights, rounded(x, weights, bits=bits), strict=True):
        [alone] = rounded(x, [weight], bits=bits)
        assert torch.isclose(alone, found).float().mean() > 0.99


def test_fewer_tokens_than_inputs() -> None:
    x, [weight] = problem(160, 24, tokens=40)
    [found] = rounded(x, [weight])
    plain = dequantise(*quantise(weight), 64)
    assert loss(x, found, weight) < 0.5 * loss(x, plain, weight)
