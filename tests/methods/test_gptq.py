"""GPTQ against slow loops over columns and codes, in numpy's float64."""

import numpy
import pytest
import torch
from support import CPU, PACKED, representative
from torch import Tensor

from lib.methods.gptq import GPTQ
from lib.methods.least_squares import FLOOR

CODES = numpy.arange(-8, 8)
INT4 = PACKED[4]


def problem(width: int, *outputs: int, tokens: int = 600):
    """Inputs (tokens, in) that have much in common, and weights (out, in), half of them 0."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(width // 8, width, generator=generator)
    x = torch.randn(tokens, width // 8, generator=generator) @ common
    x += torch.randn(tokens, width, generator=generator)
    x *= torch.rand(width, generator=generator) + 0.1
    draw = [torch.randn(2, rows, width, generator=generator) for rows in outputs]
    return x, [weight.masked_fill(chance > 0, 0) for weight, chance in draw]


def quantized(
    x: Tensor, weights: list[Tensor], dense: Tensor | None = None, sweeps: int = 2
) -> list[Tensor]:
    method = GPTQ(x.shape[1], CPU)
    method.sweeps = sweeps
    method.observe(x, dense)
    copies = [weight.clone() for weight in weights]
    method.quantize_(copies, INT4)
    return copies


def nearest(weight: Tensor) -> Tensor:
    return INT4.round_to(weight, INT4.fit_scales(weight))


def scaled_hessian(x: Tensor, damping: float = 18.0):
    """A (in, in), and the norms of the inputs (in,), as lib/methods/least_squares.py says."""
    x = x.double().numpy()
    norms = numpy.sqrt((x**2).sum(0))
    norms[norms == 0] = 1
    median = numpy.sort(norms)[(len(norms) - 1) // 2]  # torch's
    norms = norms.clip(GPTQ._least_norm * median)
    hessian = x.T @ x / norms / norms[:, None] + FLOOR * numpy.eye(x.shape[1])
    unexplained = (1 / numpy.diag(numpy.linalg.inv(hessian))).mean()
    return hessian + damping * unexplained * len(norms) / len(x) * numpy.eye(len(norms)), norms


def slow_nearest(values, scale: float):
    """The nearest of all codes times the scale, for each value."""
    grid = CODES * scale
    return grid[numpy.abs(grid - numpy.asarray(values)[..., None]).argmin(-1)]


def fitted(weights, norms) -> float:
    """The scale of some weights of one row, by trying all with five significant bits."""
    largest = numpy.abs(weights).max()
    numbers = (2.0**e * (1 + m / 16) for e in range(-30, 10) for m in range(16))
    tried = [number for number in numbers if largest / 12 <= number <= largest / 4]

    def error(scale: float) -> float:
        return ((norms * (slow_nearest(weights, scale) - weights)) ** 2).sum()

    return min(tried, key=error) if largest else 1.0


def reference(x: Tensor, weight: Tensor, sweeps: int):
    """The best values of the columns that are left, whenever one is settled, by the inverse of
    their part of A; then the best code of each weight, by trying all."""
    hessian, norms = scaled_hessian(x)
    ideal, mask = weight.double().numpy() * norms, weight.numpy() == 0
    rows, width = ideal.shape
    settled, scales = numpy.zeros_like(ideal), numpy.ones((rows, width))
    for column in range(width):
        free = numpy.linalg.inv(hessian[column:, column:])
        for row in range(rows):
            change = (ideal - settled)[row, :column]
            values = ideal[row, column:] + change @ hessian[:column, column:] @ free
            if column % 64 == 0:
                here = slice(column, column + 64)
                kept = numpy.where(mask[row, here], 0, values[:64]) / norms[here]
                scales[row, here] = fitted(kept, norms[here])
            if not mask[row, column]:
                step = scales[row, column] * norms[column]
                settled[row, column] = slow_nearest(values[0], step)
    for _ in range(sweeps):
        for column in range(width):
            change = settled - ideal
            others = change @ hessian[column] - change[:, column] * hessian[column, column]
            best = ideal[:, column] - others / hessian[column, column]
            for row in numpy.flatnonzero(~mask[:, column]):
                step = scales[row, column] * norms[column]
                settled[row, column] = slow_nearest(best[row], step)
    return settled / norms


def loss(x: Tensor, result, weight: Tensor) -> float:
    """What is minimised, where the aim is the linear's own outputs."""
    hessian, norms = scaled_hessian(x)
    change = (numpy.asarray(result, dtype=float) - weight.double().numpy()) * norms
    return numpy.einsum("oi,ij,oj->", change, hessian, change)


CASES = [(width, sweeps) for width in (40, 64, 150) for sweeps in (0, 1, 3)]


@pytest.mark.parametrize(("width", "sweeps"), representative(CASES, [(40, 3), (64, 0), (64, 1)]))
def test_as_column_by_column(width: int, sweeps: int) -> None:
    x, [weight] = problem(width, 8)
    [found] = quantized(x, [weight], sweeps=sweeps)
    expected = reference(x, weight, sweeps)
    same = numpy.isclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert same.mean() > 0.9  # a value between two codes may fall to either, and its row with it
    assert loss(x, found, weight) == pytest.approx(loss(x, expected, weight), rel=0.02)


@pytest.mark.parametrize("width", [8, 65, 200])
def test_zeros_stay_and_the_rest_is_on_the_grid(width: int) -> None:
    """The values are those that are packed, bit for bit."""
    x, weights = problem(width, 16, 5)
    weights[0][3] = 0  # a row, and a group of others
    weights[1][:, :64] = 0
    for weight, found in zip(weights, quantized(x, weights), strict=True):
        assert bool((found[weight == 0] == 0).all())
        assert torch.equal(nearest(found), found)  # they say which scales they have


def test_the_aim_is_what_the_model_computes_before_quantizing() -> None:
    """Told by the inputs of that model, or by the error of the residual stream."""
    x, [weight] = problem(96, 24)
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(96) + 0.3 * torch.randn(96, 96, generator=generator) / 96**0.5
    dense = x @ mix + 0.1 * torch.randn(x.shape, generator=generator)
    [repaired], [kept] = quantized(x, [weight], dense), quantized(x, [weight])

    def error(matrix: Tensor) -> float:
        return (x @ matrix.T - dense @ weight.T).square().sum().item()

    assert error(repaired) < 0.8 * error(kept)
    method, by_stream = GPTQ(96, CPU), weight.clone()
    method.observe(x, residual_error=(dense - x) @ weight.T)
    method.quantize_([by_stream], INT4)
    assert torch.isclose(by_stream, repaired).float().mean() > 0.97


def test_weights_of_dead_inputs_are_rounded_by_themselves() -> None:
    """No text tells anything of them: they stay, and change no others."""
    x, [weight] = problem(128, 8)
    x[:, 64:] = 0
    [found] = quantized(x, [weight])
    assert torch.equal(found[:, 64:], nearest(weight)[:, 64:])
    weight[:, 64:] = 0
    assert torch.equal(found[:, :64], quantized(x, [weight])[0][:, :64])


def test_a_nearly_dead_input_costs_the_others_nothing() -> None:
    """Its weights could repair errors of others only with values that no scale has room for."""
    x, [weight] = problem(128, 24)
    live = torch.arange(128) != 70
    errors = []
    for factor in (1, 1e-6):
        x[:, 70] *= factor
        [found] = quantized(x, [weight])
        errors.append(float((found - weight)[:, live].norm()))
        assert float((found - weight)[:, 70].norm()) < 0.5 * float(weight[:, 70].norm())
    assert errors[1] < 1.05 * errors[0]


def test_linears_that_share_an_input_are_as_each_alone() -> None:
    x, weights = problem(150, 24, 8, 40)
    for weight, found in zip(weights, quantized(x, weights), strict=True):
        [alone] = quantized(x, [weight])
        assert torch.isclose(alone, found).float().mean() > 0.99
