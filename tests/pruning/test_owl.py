"""Sparsity that differs between blocks: OWL's rule, its total, and what a run makes of it."""

import pytest
import tiny
import torch
from support import (
    ALONE,
    QUICK,
    call,
    linears_of,
    pruner_of,
    results,
    runner_of,
    weights,
    windows,
)

from lib.methods.registry import MethodSpec
from lib.methods.sparsity import ALLOCATION_SPAN
from lib.model.pretrained import decoder_blocks
from lib.pruning.allocation import of_blocks
from lib.pruning.check import measure
from lib.pruning.inputs import first_names
from lib.pruning.owl import OUTLIER, interpolate, outlier_share, owl


def slow_shares(model, ids) -> list[float]:
    """Of each block, by hooks on the model's own forward and one long list of scores."""
    _, blocks = decoder_blocks(model)
    norms: dict[torch.nn.Module, torch.Tensor] = {}
    linears = [[m for m in block.modules() if isinstance(m, torch.nn.Linear)] for block in blocks]

    def hook(module, args) -> None:
        x = args[0].flatten(0, -2).double()
        norms[module] = norms.get(module, 0) + x.square().sum(0)

    handles = [m.register_forward_pre_hook(hook) for several in linears for m in several]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    shares = []
    for several in linears:
        scores = torch.cat(
            [(m.weight.detach().abs().double() * norms[m].sqrt()).flatten() for m in several]
        )
        shares.append((scores > OUTLIER * scores.mean()).double().mean().item())
    return shares


def outlying(model):
    """The model with a few large weights, more of them in earlier blocks."""
    runner = runner_of(model)
    for index in range(len(runner.blocks)):
        for linear in linears_of(runner, index):
            linear.raw_weight.flatten()[:: 40 * (index + 1)] *= 20
    return model


def test_blocks_follow_the_share_of_outliers() -> None:
    model, ids = outlying(tiny.tiny_llama()), windows(5)
    runner = runner_of(model)
    found = owl(runner, ids, 2, 0.7, ALONE)
    shares = slow_shares(model, ids)
    sizes = [sum(w.numel() for w in block.parameters() if w.dim() == 2) for block in runner.blocks]
    expected = interpolate(shares, sizes, 0.7)
    assert shares[0] > shares[-1] > 0
    assert found == pytest.approx(expected)
    assert found[0] < 0.7 < found[-1]
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("shares", [[0.1, 0.02, 0.03], [0.0, 0.0, 0.5]])
def test_the_total_is_what_was_asked(shares: list[float]) -> None:
    sizes = [100, 300, 50]
    ratios = interpolate(shares, sizes, 0.6)
    total = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True))
    assert total == pytest.approx(0.6 * sum(sizes))
    assert max(ratios) - min(ratios) == pytest.approx(ALLOCATION_SPAN)
    assert ratios.index(min(ratios)) == shares.index(max(shares))


def test_blocks_that_are_alike_are_as_sparse() -> None:
    assert interpolate([0.1, 0.1], [5, 7], 0.6) == [0.6, 0.6]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_a_run(method: str) -> None:
    tiny.write_model("model", outlying(tiny.tiny_llama()))
    tiny.write_texts("uk", test=3)
    flags = [*QUICK, "--prune_method", method, "--calibration_data", "uk", "--save_model", "new"]
    done = call("--model", "model", *flags, "--sparsity_ratio", "0.6", "--allocation", "owl")
    assert done.status == 0, done.err
    found = results()
    first, second = found["allocation"]
    assert second - first == pytest.approx(ALLOCATION_SPAN, abs=1e-5)
    assert f"sparsity of the blocks: {first} to {second}" in done.out
    assert found["seconds"].keys() >= {"allocate", "prune"}
    total = rows = size = 0
    for name, weight in weights("new").items():
        if "layers" in name and weight.dim() == 2:
            zeros, asked = int((weight == 0).sum()), first if ".0." in name else second
            # wanda has a whole number of them in each row, ADMM in each linear
            step = len(weight) if method == "wanda" else 1
            assert 0 <= asked * weight.numel() - zeros + 1e-3 < step + 1e-2, name
            total, rows, size = total + zeros, rows + step, size + weight.numel()
    assert found["sparsity"]["overall"] == total / size
    assert 0 <= 0.6 * size - total < rows + 1  # as many as were asked for


def test_a_block_that_no_token_reached_has_no_outliers() -> None:
    assert outlier_share([]) == 0


def test_weights_that_blocks_share_are_as_sparse_as_their_first_block() -> None:
    model = tiny.HYBRIDS["Zamba2"]().requires_grad_(False)
    runner = runner_of(model)
    ratios = torch.linspace(0.62, 0.78, len(runner.blocks)).tolist()
    allocation = of_blocks(runner, ratios)
    done = pruner_of(runner, MethodSpec("wanda"), allocation).run(windows(6), 2)
    sparsity = allocation.sparsity
    measure(runner, sparsity, frozenset(done.left_dense))  # raises where one is short
    first = first_names(runner)
    assert len(set(first.values())) < len(first)
    assert all(sparsity[name] == sparsity[own] for name, own in first.items())


def test_the_total_counts_shared_weights_once() -> None:
    model = outlying(tiny.HYBRIDS["Zamba2"]().requires_grad_(False))
    runner = runner_of(model)
    ratios = owl(runner, windows(6), 2, 0.7, ALONE)
    sparsity = of_blocks(runner, ratios).sparsity
    sizes = measure(runner).sizes
    own = set(first_names(runner).values())
    total = sum(sparsity[name].ratio * sizes[name] for name in own)
    assert total == pytest.approx(0.7 * sum(sizes[name] for name in own))
    assert len(set(ratios)) > 1
