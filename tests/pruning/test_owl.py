"""Sparsity that differs between blocks: OWL's rule, its total, and what a run makes of it."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import call

from lib.dist.team import Team
from lib.methods.sparsity import ALLOCATION_SPAN
from lib.model.blocks import BlockRunner
from lib.model.linears import find_linears
from lib.model.pretrained import decoder_blocks
from lib.pruning.owl import OUTLIER, allocate, owl

CPU = torch.device("cpu")


def windows(count: int = 5) -> torch.Tensor:
    return torch.randint(3, 300, (count, 24), generator=torch.Generator().manual_seed(0))


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
    for index, block in enumerate(decoder_blocks(model)[1]):
        for linear in find_linears(block, "")[0]:
            linear.stored.flatten()[:: 40 * (index + 1)] *= 20
    return model


def test_blocks_follow_the_share_of_outliers() -> None:
    model, ids = outlying(tiny.tiny_llama()), windows()
    _, blocks = decoder_blocks(model)
    found = owl(BlockRunner(model, blocks, CPU), ids, 2, 0.7, Team(CPU, alone=True))
    shares = slow_shares(model, ids)
    sizes = [sum(w.numel() for w in block.parameters() if w.dim() == 2) for block in blocks]
    expected = allocate(shares, sizes, 0.7)
    assert shares[0] > shares[-1] > 0
    assert [one.ratio for one in found] == pytest.approx(expected)
    assert found[0].ratio < 0.7 < found[-1].ratio
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("shares", [[0.1, 0.02, 0.03], [0.0, 0.0, 0.5]])
def test_the_total_is_what_was_asked(shares: list[float]) -> None:
    sizes = [100, 300, 50]
    ratios = allocate(shares, sizes, 0.6)
    total = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True))
    assert total == pytest.approx(0.6 * sum(sizes))
    assert max(ratios) - min(ratios) == pytest.approx(ALLOCATION_SPAN)
    assert ratios.index(min(ratios)) == shares.index(max(shares))


def test_blocks_that_are_alike_are_as_sparse() -> None:
    assert allocate([0.1, 0.1], [5, 7], 0.6) == [0.6, 0.6]


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_a_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.write_model(tmp_path / "model", outlying(tiny.tiny_llama()))
    uk = tiny.write_texts(tmp_path / "uk", train=tiny.sentences(40), test=tiny.sentences(8))
    given = ["--model", model, "--device", "cpu", "--seqlen", "32", "--nsamples", "4"]
    given += ["--prune_method", method, "--calibration_data", uk, "--save_model", "new"]
    done = call(*given, "--sparsity_ratio", "0.6", "--allocation", "owl")
    assert done.status == 0, done.err
    found = json.loads(Path("out/results.json").read_text("utf-8"))
    first, second = found["allocation"]
    assert second - first == pytest.approx(ALLOCATION_SPAN, abs=1e-5)
    assert f"sparsity of the blocks: {first} to {second}" in done.out
    assert found["seconds"].keys() >= {"allocate", "prune"}
    weights = load_file("new/model.safetensors")
    for name, weight in weights.items():
        if "layers" in name and weight.dim() == 2:
            share = (weight == 0).float().mean().item()
            asked = first if ".0." in name else second
            assert share == pytest.approx(asked, abs=1 / min(weight.shape))
    assert found["sparsity"]["overall"] == pytest.approx(0.6, abs=0.02)
