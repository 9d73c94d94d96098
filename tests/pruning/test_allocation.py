"""Sparsity by what errors cost at the end of the model: the costs, the choice, the total."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import tiny
import torch
from support import CPU, prune_, runner_of, windows

from lib.model.access import Checkpoint
from lib.model.pretrained import load_config, load_model
from lib.pruning import allocation as module
from lib.pruning.allocation import Allocation, by_error, choose, costs, span
from lib.pruning.check import SparsityCheck
from lib.pruning.fisher import FisherDiagonal


def sensed(out: int, width: int, tokens: int = 10) -> FisherDiagonal:
    draw = torch.Generator().manual_seed(4)
    sums = (torch.rand(size, generator=draw, dtype=torch.float64) + 0.1 for size in (width, out))
    return FisherDiagonal(*sums, tokens)


def chosen(parts: dict[str, tuple[int, float]], ratio: float = 0.6) -> dict[str, float]:
    """What weights of (size, cost of an error) choose."""
    cubes = torch.tensor(span(ratio), dtype=torch.float64) ** 3
    prices = {name: error * cubes for name, (_, error) in parts.items()}
    return choose(prices, {name: size for name, (size, _) in parts.items()}, ratio)


def test_the_cost_is_the_lowest_of_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every choice of three parts that has as many zeros."""
    monkeypatch.setattr(module, "STEPS", 20)
    monkeypatch.setattr(module, "MAX_DECREASE", 0.4 * 2 / 3)  # as far on either side
    errors = (3, 1, 0.5)

    def cost(choice) -> float:
        return sum(error * s**3 for error, s in zip(errors, choice, strict=True))

    choices = itertools.product(span(0.6), repeat=3)
    best = min(cost(choice) for choice in choices if sum(choice) == pytest.approx(1.8))
    found = chosen({str(error): (1, error) for error in errors})
    assert cost(found.values()) <= best * 1.002


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5, 0.98])
def test_costs_are_summed_in_order(ratio: float) -> None:
    weight, one = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), sensed(8, 10)
    each = sorted(
        (weight.double().square() * one.inputs * (one.grad_sq / 10)[:, None]).flatten().tolist()
    )
    usual = sum(each[: int(ratio * 80)])
    found = costs(weight, one, ratio)
    assert found.isfinite().all() and (found.diff() >= 0).all()
    if usual:  # they grow by the square
        sums = [sum(each[: int(share * 80)]) for share in span(ratio)]
        assert found.tolist() == pytest.approx([s**2 / usual for s in sums])


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5, 0.98])
def test_any_ratio_has_its_total(ratio: float) -> None:
    draw = torch.Generator().manual_seed(0)
    prices, sizes = {}, {}
    for size in (8, 30, 100):
        weight = torch.randn(size, 10, generator=draw)
        prices[str(size)], sizes[str(size)] = costs(weight, sensed(size, 10), ratio), size * 10
    found = choose(prices, sizes, ratio)
    assert all(0 <= share <= 1 - 0.33 * (1 - ratio) for share in found.values())
    total = sum(found[name] * size for name, size in sizes.items())
    assert total == pytest.approx(ratio * 1380, abs=1e-3 * 1380)


def test_what_errors_cost_reaches_the_method() -> None:
    models = [tiny.tiny_llama().requires_grad_(False) for _ in range(2)]
    allocation = by_error(runner_of(models[0]), windows(3), 0.7)
    prune_(models[0], "admm", allocation)
    prune_(models[1], "admm", Allocation(allocation.sparsity))
    first, second = (model.model.layers[0].self_attn.q_proj.weight for model in models)
    assert not torch.equal(first == 0, second == 0)
    assert (first == 0).sum() == (second == 0).sum()


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT-2", "Zamba2"])
def test_architectures_reach_what_was_allocated(name: str) -> None:
    """Experts, transposed weights, and weights that several blocks share: allocated once."""
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    allocation = by_error(runner, windows(6), 0.6)
    done = prune_(runner, "admm", allocation, windows(6))
    target = allocation.sparsity
    measured = SparsityCheck(runner, target, done.left_dense)
    asked = sum(target[name].ratio * size for name, size in measured.sizes.items())
    rows = {
        linear.name: linear.shape[0]
        for index in range(len(runner.blocks))
        for linear in runner.linears(index)
    }
    experts = [names for notes in done.notes for names in sum(notes.fallbacks.values(), [])]
    by_row = sum(rows[name] for names in experts for name in names.split(", "))
    # a whole number in each, and in each row of experts that few tokens reached, by Wanda
    assert 0 <= asked - sum(measured.zeros.values()) <= len(target) + by_row
    if name == "Zamba2":  # names count a weight more than once
        alike = [one.ratio for path, one in target.items() if "shared_transformer" in path]
        assert len(alike) > len(set(alike)) > 0
    else:
        assert asked == pytest.approx(0.6 * sum(measured.sizes.values()), rel=1e-6)


@pytest.mark.usefixtures("elsewhere")
def test_a_4_bit_linear_counts_by_its_weights_not_its_bytes() -> None:
    """Beside linears that are not quantized, of the same shapes."""
    tiny.write_model("model", tiny.tiny_llama(hidden_size=64, intermediate_size=192))
    checkpoint = Checkpoint("model")
    options = dict(dtype=torch.float32, device_map={"": CPU}, load_bit="4")
    runner = runner_of(load_model(checkpoint, load_config(checkpoint), **options))
    for linear in runner.linears(0):
        plain = torch.nn.Linear(*reversed(linear.shape), bias=False)
        plain.weight.data.copy_(linear.matrix())
        path = linear.name.removeprefix(f"{runner.name}.0.")
        runner.blocks[0].set_submodule(path, plain.requires_grad_(False))
    found = by_error(runner, windows(3), 0.7)
    sizes = [prod(linear.shape) for index in (0, 1) for linear in runner.linears(index)]
    ratios = [sparsity.ratio for sparsity in found.sparsity.values()]
    total = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True))
    assert total == pytest.approx(0.7 * sum(sizes))
