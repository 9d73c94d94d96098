"""Sparsity of blocks by their outliers (OWL), and layers from a file: formula, total, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, prune_, results, runner_of, succeed, weights, windows
from torch import nn

from lib.methods.sparsity import Sparsity
from lib.pruning.allocation import Allocation, allocate
from lib.pruning.check import SparsityCheck
from lib.pruning.owl import by_outliers, outlier_share, owl_sparsities


def test_outliers_by_hand() -> None:
    """The mean is 2, over both matrices; only 11 is above five times that."""
    scores = [torch.tensor([[1.0, 1.0], [11.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    assert outlier_share(lambda: scores) == 1 / 8


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_the_formula_of_the_authors(ratio: float) -> None:
    """Density: shares scaled to 2 lambda, less their mean, around 1 - S."""
    shares = [0.02, 0.05, 0.03, 0.08]
    low, high = min(shares), max(shares)
    scaled = [(share - low) * (1 / (high - low)) * 0.08 * 2 for share in shares]
    density = [one - sum(scaled) / 4 + (1 - ratio) for one in scaled]
    found = [each.ratio for each in owl_sparsities(shares, [10] * 4, Sparsity(ratio))]
    assert found == pytest.approx([1 - each for each in density])
    assert sum(found) / 4 == pytest.approx(ratio)


def test_any_total_is_kept() -> None:
    shares, sizes = [0.1, 0.3, 0.2], [30, 10, 20]
    for ratio in (0.0, 0.01, 0.5, 0.98):
        found = [each.ratio for each in owl_sparsities(shares, sizes, Sparsity(ratio))]
        assert all(0 <= each < 1 for each in found)
        total = sum(each * size for each, size in zip(found, sizes, strict=True))
        assert total == pytest.approx(ratio * 60)
    assert {each.ratio for each in owl_sparsities([0.1] * 3, sizes, Sparsity(0.6))} == {0.6}


@pytest.mark.parametrize("sizes", [[10] * 5, [10, 20, 30, 10, 30]])
def test_whole_numbers_of_every_eight(sizes: list[int]) -> None:
    """No more go than by 4 everywhere, and fewer of a block's than another lets go are less."""
    shares = [0.1, 0.3, 0.2, 0.11, 0.29]
    found = owl_sparsities(shares, sizes, Sparsity(0.5, 4, 8))
    total = sum(each.n * size for each, size in zip(found, sizes, strict=True))
    left = 4 * sum(sizes) - total
    assert 0 <= left < min(sizes) and {each.m for each in found} == {8}
    assert all(each.ratio == each.n / 8 for each in found)
    assert len({each.n for each in found}) > 1
    counts = [each.n for each in found]
    assert min(counts[0], counts[3]) > max(counts[1], counts[4])


def whole(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """The share of outliers of each block, by hooks on the dense model."""
    found = []
    for block in model.model.layers:
        linears = [each for each in block.modules() if isinstance(each, nn.Linear)]
        seen, hooks = {}, []
        for linear in linears:

            def see(module, args, seen=seen) -> None:
                seen[module] = args[0].flatten(0, 1)

            hooks.append(linear.register_forward_pre_hook(see))
        with torch.no_grad():
            model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        flat = [(one.weight.abs() * seen[one].norm(dim=0)).flatten() for one in linears]
        scores = torch.cat(flat).double()
        found.append(float((scores > 5 * scores.mean()).double().mean()))
    return found


def test_the_blocks_of_a_model_as_by_hooks() -> None:
    model, ids = tiny.tiny_llama(num_hidden_layers=4).requires_grad_(False), windows(5)
    runner = runner_of(model)
    shares = whole(model, ids)
    found = by_outliers(runner, ids, Sparsity(0.6))
    expected = owl_sparsities(shares, [1] * 4, Sparsity(0.6))
    for name, sparsity in found.items():
        assert sparsity.ratio == pytest.approx(expected[int(name.split(".")[2])].ratio, abs=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT-2", "Zamba2"])
def test_architectures_reach_what_was_allocated(name: str) -> None:
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    allocation = allocate(runner, windows(12), Sparsity(0.6), "owl")
    done = prune_(runner, "sparsegpt", allocation, windows(12))
    assert SparsityCheck(runner, allocation.sparsity, done.left_dense).overall == pytest.approx(
        0.6, abs=0.02
    )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "ria", "magnitude"])
def test_linears_of_one_input_may_lose_other_numbers_of_a_group(method: str) -> None:
    runner = runner_of(tiny.tiny_llama().requires_grad_(False))
    layers = {
        linear.name: Sparsity(n / 8, n, 8)
        for linear, n in zip(runner.each_linear(), [3, 4, 5, 4, 2, 6, 4] * 2, strict=True)
    }
    prune_(runner, method, Allocation(layers))
    for linear in runner.each_linear():
        zero = (linear.matrix() == 0).unflatten(1, (-1, 8)).sum(-1)
        assert (zero == layers[linear.name].n).all(), linear.name


# --- files

GIVEN = ["--model", "model", "--prune_method", "wanda", "--calibration_data", "uk", *QUICK]


@pytest.fixture
def files(elsewhere: None) -> None:
    tiny.write_model("model", tiny.tiny_llama(num_hidden_layers=4))
    tiny.write_texts("uk")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "rule", ["owl", "error", "uniform", "owl --sparsity_type 4:8 --prune_method sparsegpt"]
)
def test_what_a_run_leaves_makes_it_again(rule: str) -> None:
    rule, *flags = rule.split()
    first = [*GIVEN, *flags, "--allocation", rule, "--save_model", "first-model"]
    succeed(*first, "--save", "first")
    layers = json.loads(Path("first/allocation.json").read_text())
    assert len(layers) == 28 and (len(set(layers.values())) > 1) == (rule != "uniform")
    again = ["--allocation", "first/allocation.json", "--save", "again"]
    succeed(*GIVEN, *flags, *again, "--save_model", "again-model")
    one, other = weights("first-model"), weights("again-model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = results("again")["fingerprint"]["pruning"]["--allocation"]
    assert found.startswith("layers ") and "first" not in found
    text = Path("first/allocation.json").read_text()
    Path("moved.json").write_text(text)
    succeed(*GIVEN, *flags, "--allocation", "moved.json", "--save", "moved")
    assert results("moved")["fingerprint"]["pruning"]["--allocation"] == found


@pytest.mark.usefixtures("files", "no_weights")
def test_files_that_do_not_fit_are_refused() -> None:
    names = [one.name for one in runner_of(tiny.tiny_llama(num_hidden_layers=4)).each_linear()]
    good = dict.fromkeys(names, 0.5)
    cases = [
        ("[]", "", f"lacks {names[0]}"),
        (json.dumps({name: 0.5 for name in names[1:]}), "", f"lacks {names[0]}"),
        (json.dumps(good | {"model.other": 0.5}), "", "names model.other"),
        (json.dumps(good | {names[3]: 1}), "", f"{names[3]} is 1", "below 1"),
        (json.dumps(good | {names[3]: "half"}), "", f"{names[3]} is 'half'", "a number"),
        (json.dumps(good), "--sparsity_ratio 0.6", "0.5 of all weights", "--sparsity_ratio is 0.6"),
        (json.dumps(dict.fromkeys(names, 0.45)), "--sparsity_type 4:8", "a multiple of 1/8"),
        ("{", "", "it is not JSON"),
    ]
    for text, flags, *words in cases:
        Path("layers.json").write_text(text)
        done = call(*GIVEN, "--allocation", "layers.json", *flags.split())
        assert done.status == 1 and len(done.complaints) == 1, done.err
        assert all(word in done.complaints[0] for word in words), done.complaints
    done = call(*GIVEN, "--allocation", "none.json")
    assert done.status == 1 and "it is not JSON" in done.complaints[0]
    done = call(*GIVEN, "--allocation", "nosuch")
    assert done.status == 2 and "uniform, error, owl or FILE.json" in done.complaints[0]
    done = call(*GIVEN, "--allocation", "owl", "--sparsity_type", "2:4")
    assert done.status == 2 and "unstructured" in done.complaints[0]
