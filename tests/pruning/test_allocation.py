"""Sparsity by the error measured at the end of the model: the errors, the choice, the total."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import tiny
import torch
from support import CPU, QUICK, call, linears_of, results, runner_of, windows

from lib.dist.team import Team
from lib.methods.sparsity import Sparsity
from lib.pruning import allocation
from lib.pruning.allocation import SPAN, STEPS, Part, allocate, by_error, dropped, span


def part(name: str, size: int, error: float) -> Part:
    growth = torch.tensor(span(0.6), dtype=torch.float64) ** 3
    return Part([name], size, growth / growth[STEPS // 2], error)


def test_parts_that_cost_more_keep_more_at_an_equal_total() -> None:
    parts = [part("a", 100, 4.0), part("b", 300, 1.0), part("c", 50, 0.1)]
    found = allocate(parts, 0.6)
    assert found["a"] < found["b"] < found["c"]
    assert sum(found[p.names[0]] * p.size for p in parts) == pytest.approx(0.6 * 450)


def test_parts_that_are_alike_are_as_sparse() -> None:
    found = allocate([part("a", 100, 2.0), part("b", 100, 2.0)], 0.6)
    assert found == {"a": pytest.approx(0.6), "b": pytest.approx(0.6)}


def test_the_error_is_the_lowest_of_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every choice of three parts that has as many zeros."""
    monkeypatch.setattr(allocation, "STEPS", 20)
    shares = span(0.6)
    growth = torch.tensor(shares, dtype=torch.float64) ** 3
    parts = [Part([name], 1, growth, error) for name, error in (("a", 3), ("b", 1), ("c", 0.5))]

    def error(choice) -> float:
        return sum(p.error * s**3 for p, s in zip(parts, choice, strict=True))

    best = min(
        error(choice)
        for choice in itertools.product(shares, repeat=3)
        if sum(choice) == pytest.approx(1.8)
    )
    found = list(allocate(parts, 0.6).values())
    assert error(found) <= best * 1.002


def test_what_is_dropped_is_summed_in_order() -> None:
    score = torch.rand(8, 10, generator=torch.Generator().manual_seed(0))
    ordered = sorted(score.flatten().double().tolist())
    sums = [sum(s**2 for s in ordered[: int(share * 80)]) for share in span(0.5)]
    assert dropped(score, 0.5).tolist() == pytest.approx(sums)


def test_errors_are_those_of_the_model_with_one_part_pruned(monkeypatch) -> None:
    """By the model's own forward: attention or MLP of one block pruned by Wanda, the rest dense."""
    seen = {}
    monkeypatch.setattr(allocation, "allocate", lambda parts, ratio: seen.update(parts=parts) or {})
    model, ids = tiny.tiny_llama(), windows(3)
    runner = runner_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_error(runner, "model.layers", ids, 2, 0.5, Team(CPU, alone=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def last() -> torch.Tensor:
        states = runner.capture(ids, 3, CPU)
        for index in range(len(runner.blocks)):
            runner.advance_(states, index)
        return states.hidden

    dense, inputs = last(), {}

    def note(name: str):
        def hook(_, args) -> None:
            inputs.setdefault(name, args[0])

        return hook

    for index in range(len(runner.blocks)):
        for linear in linears_of(runner, index):
            linear.module.register_forward_pre_hook(note(linear.name))
    last()
    assert [p.names[0].split(".")[3] for p in seen["parts"]] == ["self_attn", "mlp"] * 2
    for one in seen["parts"]:
        for name in one.names:
            module = model.get_submodule(name)
            x = inputs[name.removeprefix("model.layers.")]
            score = module.weight.data.abs() * x.flatten(0, 1).norm(dim=0)
            module.weight.data[Sparsity(0.5).mask(score)] = 0
        change = (last() - dense).square().sum(-1) / dense.square().sum(-1)
        assert one.error == pytest.approx(change.sum().item(), rel=1e-3)
        model.load_state_dict(before)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_a_run(method: str) -> None:
    tiny.write_model("model")
    tiny.write_texts("uk", test=3)
    flags = [*QUICK, "--prune_method", method, "--calibration_data", "uk"]
    done = call("--model", "model", *flags, "--sparsity_ratio", "0.6", "--allocation", "error")
    assert done.status == 0, done.err
    found = results()
    shares = found["allocation"]
    assert shares.keys() == found["sparsity"]["linears"].keys()
    assert max(shares.values()) - min(shares.values()) <= 2 * SPAN + 1e-6
    assert len(set(shares.values())) > 1
    for name, share in found["sparsity"]["linears"].items():
        assert share == pytest.approx(shares[name], abs=0.05)  # a whole number in each row
    assert found["sparsity"]["overall"] == pytest.approx(0.6, abs=0.02)
    assert found["seconds"].keys() >= {"allocate", "prune"}


def test_as_many_zeros_as_uniform() -> None:
    runner = runner_of(tiny.tiny_llama())
    found = by_error(runner, "x", windows(3), 2, 0.7, Team(CPU, alone=True))
    sizes = {
        f"x.{linear.name}": prod(linear.shape)
        for index in range(len(runner.blocks))
        for linear in linears_of(runner, index)
    }
    total = sum(found[name].ratio * size for name, size in sizes.items())
    assert total == pytest.approx(0.7 * sum(sizes.values()))
