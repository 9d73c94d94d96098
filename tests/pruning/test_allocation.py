"""Sparsity of layers by errors, outliers or a file: gradients, costs, choices, totals, refusals."""

from __future__ import annotations

import itertools
import json
from math import prod
from pathlib import Path

import pytest
import tiny
import torch
from support import CPU, QUICK, call, prune_, representative, runner_of, succeed, weights, windows
from support import results as results_of
from torch import Tensor, nn

from lib.calibration import allocation as module
from lib.calibration.allocation import Allocation, allocate, by_error, choose, costs, span
from lib.calibration.fisher import FisherDiagonal, backward_pass, draw
from lib.calibration.owl import by_outliers, outlier_share, owl_sparsities
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.checkpoint import Checkpoint
from lib.model.linears import experts_implementation, watch_outputs
from lib.model.pretrained import load_config, load_model
from lib.model.sparsity_check import SparsityCheck

RATIOS = 0.0, 0.02, 0.5, 0.98


# --- squared gradients of the sampled loss at the linears' outputs, against autograd's


def sensed(
    runner: BlockRunner, ids: Tensor, uniforms: Tensor, batch_size: int
) -> dict[str, FisherDiagonal]:
    found: dict[str, FisherDiagonal] = {}
    runner.batch_size = batch_size
    with experts_implementation(runner.model, "eager"):
        for diagonals in backward_pass(runner, ids, uniforms):
            found |= {linear.name: diagonal for linear, diagonal in diagonals.items()}
    return found


def by_autograd(runner: BlockRunner, ids: Tensor, uniforms: Tensor) -> dict[str, list]:
    """{linear's name: inputs, grad_sq, tokens and weighted inputs}, window by window."""
    model, found = runner.model, {}
    outputs: list[tuple] = []

    def see(linear, x: Tensor, out: Tensor) -> None:
        out.retain_grad()
        outputs.append((linear.name, x.detach().flatten(0, -2), out))

    linears = list(runner.each_linear())
    for window, drawn in zip(ids, uniforms, strict=True):
        outputs.clear()
        with experts_implementation(model, "eager"), watch_outputs(linears, see):
            embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].double()
        sums = logits.detach().softmax(-1).cumsum(-1)
        labels = (sums <= drawn[:, None]).sum(-1)
        (-logits.log_softmax(-1).gather(-1, labels[:, None]).sum()).backward()
        for name, x, out in outputs:
            one, squares = found.setdefault(name, [0, 0, 0, 0]), x.double().square()
            one[0] += squares.sum(0)
            one[2] += len(x)
            if out.grad is not None:
                slopes = out.grad.flatten(0, -2).double().square()
                one[1] += slopes.sum(0)
                one[3] += slopes.sum(1) @ squares
    return found


@pytest.mark.parametrize("vocabulary", [10, 1024, 2500])
def test_labels_are_drawn_by_the_cumulative_probability(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(2, 50, vocabulary, generator=generator)).softmax(-1)
    uniforms = torch.rand(2, 50, generator=generator)
    labels = draw(p, uniforms).squeeze(-1)
    after = p.double().cumsum(-1).gather(-1, labels[..., None]).squeeze(-1)
    before = after - p.gather(-1, labels[..., None]).squeeze(-1)
    assert ((before - 1e-5 <= uniforms) & (uniforms <= after + 1e-5)).all()
    assert (draw(p, torch.zeros(2, 50)) == 0).all()
    assert (draw(p, torch.ones(2, 50)) < vocabulary).all()


MODELS = ["Llama", "GPT-2", "Gemma 2", "Mixtral", "Falcon", "GPT-OSS", "Mamba", "Zamba2"]


@pytest.mark.parametrize("name", representative(MODELS, ["Llama", "GPT-2", "GPT-OSS", "Zamba2"]))
def test_gradients_are_those_of_autograd_through_the_whole_model(name: str) -> None:
    model = tiny.ALL[name]().requires_grad_(False)
    runner, ids = runner_of(model), windows(3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    expected = by_autograd(runner, ids, uniforms)
    assert expected
    for batch_size in (1, 2):
        found = sensed(runner, ids, uniforms, batch_size)
        for linear, one in found.items():
            inputs, grad_sq, tokens, weighted = expected.get(linear, (0, 0, 0, 0))
            assert one.tokens == tokens, linear
            assert torch.allclose(one.inputs, one.inputs.new_zeros(()) + inputs, rtol=1e-3)
            for sums, of_autograd in ((one.grad_sq, grad_sq), (one.weighted, weighted)):
                of_autograd = sums.new_zeros(()) + of_autograd
                assert torch.allclose(sums, of_autograd, rtol=1e-2, atol=1e-7), linear
        assert any(one.grad_sq.any() for one in found.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# --- by what errors cost at the end of the model


def diagonal(out: int, width: int, tokens: int = 10) -> FisherDiagonal:
    draw = torch.Generator().manual_seed(4)
    sums = [torch.rand(size, generator=draw, dtype=torch.float64) + 0.1 for size in (width, out)]
    return FisherDiagonal(*sums, tokens, sums[0])


def test_the_cost_is_the_lowest_of_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every choice of three parts that has as many zeros."""
    monkeypatch.setattr(module, "STEPS", 20)
    monkeypatch.setattr(module, "MAX_DECREASE", 0.4 * 2 / 3)  # as far on either side
    errors = (3, 1, 0.5)

    def cost(choice) -> float:
        return sum(error * s**3 for error, s in zip(errors, choice, strict=True))

    choices = itertools.product(span(0.6), repeat=3)
    best = min(cost(choice) for choice in choices if sum(choice) == pytest.approx(1.8))
    cubes = torch.tensor(span(0.6), dtype=torch.float64) ** 3
    names = {str(error): error for error in errors}
    prices = {name: error * cubes for name, error in names.items()}
    assert cost(choose(prices, dict.fromkeys(names, 1), 0.6).values()) <= best * 1.002


@pytest.mark.parametrize("ratio", RATIOS)
def test_costs_are_summed_in_order_and_any_ratio_has_its_total(ratio: float) -> None:
    weight, one = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), diagonal(8, 10)
    each = (weight.double().square() * one.inputs * (one.grad_sq / 10)[:, None]).flatten()
    each = each.sort().values
    usual = each[: int(ratio * 80)].sum()
    found = costs(weight, one, ratio)
    assert found.isfinite().all() and (found.diff() >= 0).all()
    if usual:  # they grow by the square
        sums = [float(each[: int(share * 80)].sum()) for share in span(ratio)]
        assert found.tolist() == pytest.approx([s**2 / float(usual) for s in sums])
    draw = torch.Generator().manual_seed(0)
    prices, sizes = {}, {}
    for size in (8, 30, 100):
        weight = torch.randn(size, 10, generator=draw)
        prices[str(size)], sizes[str(size)] = costs(weight, diagonal(size, 10), ratio), size * 10
    chosen = choose(prices, sizes, ratio)
    assert all(0 <= share <= 1 - 0.33 * (1 - ratio) for share in chosen.values())
    total = sum(chosen[name] * size for name, size in sizes.items())
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
    rows = {linear.name: linear.shape[0] for linear in runner.each_linear()}
    experts = [names for notes in done.notes for names in sum(notes.fallbacks.values(), [])]
    by_row = sum(rows[name] for names in experts for name in names.split(", "))
    # a whole number in each, and in each row of experts that few tokens reached, by Wanda
    assert 0 <= asked - sum(measured.zeros.values()) <= len(target) + by_row
    if name == "Zamba2":  # names count a weight more than once
        alike = [one.ratio for path, one in target.items() if "shared_transformer" in path]
        assert len(alike) > len(set(alike)) > 0
    else:
        assert asked == pytest.approx(0.6 * sum(measured.sizes.values()), rel=1e-6)
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    allocation = allocate(runner, windows(12), Sparsity(0.6), "owl")
    done = prune_(runner, "sparsegpt", allocation, windows(12))
    measured = SparsityCheck(runner, allocation.sparsity, done.left_dense)
    assert measured.overall == pytest.approx(0.6, abs=0.02)


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
    sizes = [prod(linear.shape) for linear in runner.each_linear()]
    ratios = [sparsity.ratio for sparsity in found.sparsity.values()]
    total = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True))
    assert total == pytest.approx(0.7 * sum(sizes))


# --- by the blocks' outliers


def test_the_formula_of_the_authors_of_owl() -> None:
    """Density: shares scaled to 2 lambda, less their mean, around 1 - S."""
    # the mean is 2, over both matrices; only 11 is above five times that
    scores = [torch.tensor([[1.0, 1.0], [11.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    assert outlier_share(lambda: scores) == 1 / 8
    shares = [0.02, 0.05, 0.03, 0.08]
    low, high = min(shares), max(shares)
    scaled = [(share - low) * (1 / (high - low)) * 0.08 * 2 for share in shares]
    for ratio in (0.5, 0.7):
        density = [one - sum(scaled) / 4 + (1 - ratio) for one in scaled]
        found = [each.ratio for each in owl_sparsities(shares, [10] * 4, Sparsity(ratio))]
        assert found == pytest.approx([1 - each for each in density])
        assert sum(found) / 4 == pytest.approx(ratio)
    shares, sizes = [0.1, 0.3, 0.2], [30, 10, 20]
    for ratio in RATIOS:  # any total is kept
        found = [each.ratio for each in owl_sparsities(shares, sizes, Sparsity(ratio))]
        assert all(0 <= each < 1 for each in found)
        total = sum(each * size for each, size in zip(found, sizes, strict=True))
        assert total == pytest.approx(ratio * 60)
    assert {each.ratio for each in owl_sparsities([0.1] * 3, sizes, Sparsity(0.6))} == {0.6}


@pytest.mark.parametrize("sizes", [[10] * 5, [10, 20, 30, 10, 30]])
def test_whole_numbers_of_every_eight(sizes: list[int]) -> None:
    """No more go than by 4 everywhere, and fewer of a block's than another lets go are less."""
    found = owl_sparsities([0.1, 0.3, 0.2, 0.11, 0.29], sizes, Sparsity(0.5, 4, 8))
    total = sum(each.n * size for each, size in zip(found, sizes, strict=True))
    assert 0 <= 4 * sum(sizes) - total < min(sizes) and {each.m for each in found} == {8}
    counts = [each.n for each in found]
    assert [each.ratio for each in found] == [n / 8 for n in counts] and len(set(counts)) > 1
    assert min(counts[0], counts[3]) > max(counts[1], counts[4])


@torch.no_grad()
def test_outliers_of_blocks_are_those_by_hooks() -> None:
    model, ids = tiny.tiny_llama(num_hidden_layers=4).requires_grad_(False), windows(5)
    shares, seen = [], {}

    def see(module, args) -> None:
        seen[module] = args[0].flatten(0, 1)

    linears = [[m for m in b.modules() if isinstance(m, nn.Linear)] for b in model.model.layers]
    handles = [one.register_forward_pre_hook(see) for each in linears for one in each]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for each in linears:
        flat = [(one.weight.abs() * seen[one].norm(dim=0)).flatten() for one in each]
        scores = torch.cat(flat).double()
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
    expected = owl_sparsities(shares, [1] * 4, Sparsity(0.6))
    for name, sparsity in by_outliers(runner_of(model), ids, Sparsity(0.6)).items():
        assert sparsity.ratio == pytest.approx(expected[int(name.split(".")[2])].ratio, abs=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "ria", "magnitude"])
def test_linears_of_one_input_may_lose_other_numbers_of_a_group(method: str) -> None:
    runner = runner_of(tiny.tiny_llama().requires_grad_(False))
    pairs = zip(runner.each_linear(), [3, 4, 5, 4, 2, 6, 4] * 2, strict=True)
    layers = {linear.name: Sparsity(n / 8, n, 8) for linear, n in pairs}
    prune_(runner, method, Allocation(layers))
    for linear in runner.each_linear():
        zero = (linear.matrix() == 0).unflatten(1, (-1, 8)).sum(-1)
        assert (zero == layers[linear.name].n).all(), linear.name


# --- files

GIVEN = ["--model", "model", "--prune_method", "wanda", "--calibration_data", "uk", *QUICK]
RULES = ["owl", "error", "uniform", "owl --sparsity_type 4:8 --prune_method sparsegpt"]


@pytest.fixture
def files(elsewhere: None) -> None:
    tiny.write_model("model", tiny.tiny_llama(num_hidden_layers=4))
    tiny.write_texts("uk")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("rule", representative(RULES, RULES[1::2]))
def test_what_a_run_leaves_makes_it_again(rule: str) -> None:
    rule, *flags = rule.split()
    succeed(*GIVEN, *flags, "--allocation", rule, "--save_model", "first-model", "--save", "first")
    file = Path("first/allocation.json")
    layers = json.loads(file.read_text())
    assert len(layers) == 28 and (len(set(layers.values())) > 1) == (rule != "uniform")
    Path("moved.json").write_text(file.read_text())
    one, prints = weights("first-model"), []
    for name in (file, "moved.json"):
        again = [
            "--allocation",
            name,
            "--save",
            "again",
            "--save_model",
            f"{Path(name).stem}-model",
        ]
        succeed(*GIVEN, *flags, *again)
        other = weights(again[-1])
        assert all(torch.equal(one[name], other[name]) for name in one)
        prints.append(results_of("again")["fingerprint"]["pruning"]["--allocation"])
    assert prints[0].startswith("layers ") and "first" not in prints[0] and prints[0] == prints[1]


@pytest.mark.usefixtures("files", "no_weights")
def test_files_that_do_not_fit_are_refused() -> None:
    names = [one.name for one in runner_of(tiny.tiny_llama(num_hidden_layers=4)).each_linear()]
    good = dict.fromkeys(names, 0.5)
    cases = [
        ("[]", "", names[0]),
        (json.dumps({name: 0.5 for name in names[1:]}), "", names[0]),
        (json.dumps(good | {"model.other": 0.5}), "", "model.other"),
        (json.dumps(good | {names[3]: 1}), "", f"{names[3]} is 1"),
        (json.dumps(good | {names[3]: "half"}), "", f"{names[3]} is 'half'"),
        (json.dumps(good), "--sparsity_ratio 0.6", "--sparsity_ratio is 0.6"),
        (json.dumps(dict.fromkeys(names, 0.45)), "--sparsity_type 4:8", "1/8"),
        ("{", "", "not JSON"),
    ]
    for text, flags, words in cases:
        Path("layers.json").write_text(text)
        done = call(*GIVEN, "--allocation", "layers.json", *flags.split())
        (line,) = done.complaints
        assert done.status == 1 and words in line
    for status, flags in ((1, "none.json"), (2, "nosuch"), (2, "owl --sparsity_type 2:4")):
        done = call(*GIVEN, "--allocation", *flags.split())
        assert done.status == status and "--allocation" in done.complaints[0]
