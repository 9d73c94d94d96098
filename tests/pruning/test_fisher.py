"""Squared gradients of the sampled loss at the linears' outputs, against autograd's."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import CPU, runner_of, windows
from torch import Tensor

from lib.model.blocks import BlockRunner
from lib.model.linears import eager_experts, find_linears, watch_outputs
from lib.model.pretrained import decoder_blocks
from lib.pruning.fisher import BackwardPass, FisherDiagonal, sampled_nll_backward_

MODELS = {
    "Llama": tiny.tiny_llama,
    **{name: tiny.ARCHITECTURES[name] for name in ("GPT-2", "Gemma 2", "Mixtral", "Falcon")},
    **{name: tiny.HYBRIDS[name] for name in ("GPT-OSS", "Mamba", "Zamba2")},
}


def sensed(
    runner: BlockRunner, ids: Tensor, uniforms: Tensor, batch_size: int
) -> dict[str, FisherDiagonal]:
    found = {}
    with eager_experts(runner.model):
        way = BackwardPass(runner, ids, batch_size, uniforms)
        for index in reversed(range(len(runner.blocks))):
            linears, _ = find_linears(runner.blocks[index], f"x.{index}")
            found |= way.through(index, linears)
    return found


def by_autograd(runner: BlockRunner, ids: Tensor, uniforms: Tensor) -> dict[str, list]:
    """{linear's name: sums of squares of its inputs and of grad_sq, tokens}, window by window."""
    model, found = runner.model, {}
    linears = [
        linear
        for index, block in enumerate(runner.blocks)
        for linear in find_linears(block, f"x.{index}")[0]
    ]
    outputs: list[tuple] = []

    def see(linear, x: Tensor, out: Tensor) -> None:
        out.retain_grad()
        outputs.append((linear.name, x.detach(), out))

    for window, drawn in zip(ids, uniforms, strict=True):
        outputs.clear()
        with eager_experts(model), watch_outputs(linears, see):
            embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].double()
        sums = logits.detach().softmax(-1).cumsum(-1)
        labels = [
            int((row <= float(chance)).sum()) for row, chance in zip(sums, drawn, strict=True)
        ]
        (-logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()).backward()
        for name, x, out in outputs:
            one = found.setdefault(name, [0, 0, 0])
            one[0] += x.flatten(0, -2).double().square().sum(0)
            one[1] += 0 if out.grad is None else out.grad.flatten(0, -2).double().square().sum(0)
            one[2] += x.flatten(0, -2).shape[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_as_autograd_through_the_whole_model(name: str) -> None:
    model = MODELS[name]().requires_grad_(False)
    runner, ids = runner_of(model), windows(3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    found, expected = sensed(runner, ids, uniforms, 2), by_autograd(runner, ids, uniforms)
    assert expected
    for linear, one in found.items():
        inputs, grad_sq, tokens = expected.get(linear, (0, 0, 0))
        assert one.tokens == tokens, linear
        assert torch.allclose(one.inputs, one.inputs.new_zeros(()) + inputs, rtol=1e-3)
        assert torch.allclose(
            one.grad_sq, one.grad_sq.new_zeros(()) + grad_sq, rtol=1e-2, atol=1e-7
        )
    assert any(one.grad_sq.any() for one in found.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_batches_change_nothing_but_rounding() -> None:
    runner, ids = runner_of(tiny.tiny_llama().requires_grad_(False)), windows(5)
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    several, alone = (sensed(runner, ids, uniforms, size) for size in (5, 1))
    for name, one in several.items():
        assert one.tokens == alone[name].tokens == ids.numel()
        assert torch.allclose(one.grad_sq, alone[name].grad_sq, rtol=1e-3)


def test_labels_are_drawn_from_the_distribution() -> None:
    """A slope is the distribution less the label's one; labels come as often as they are likely."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=draw).requires_grad_()
    every = logits.expand(4, 5000, 7).detach().clone().requires_grad_()
    sampled_nll_backward_(lambda some: every[:, some], torch.rand(4, 5000, generator=draw))
    p = logits.detach().softmax(-1)
    labels = p - every.grad
    assert torch.allclose(labels.amax(-1), torch.ones(4, 5000), atol=1e-5)
    assert torch.allclose(labels.sum(-1), torch.ones(4, 5000), atol=1e-4)
    assert torch.allclose(labels.mean((0, 1)), p, atol=0.01)


def test_what_is_sensed_tells_what_an_error_costs() -> None:
    """A small random error of one linear's outputs, against 1/2 sum of F times its square."""
    model = tiny.tiny_llama().requires_grad_(False)
    runner, ids = runner_of(model), windows(4)
    draw = torch.Generator().manual_seed(2)
    several = [sensed(runner, ids, torch.rand(ids.shape, generator=draw), 4) for _ in range(30)]
    linears = find_linears(runner.blocks[0], "x.0")[0]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    for linear in linears:
        grad_sq = sum(found[linear.name].grad_sq for found in several) / len(several)
        size = 0.01
        noise = size * torch.randn(20, *ids.shape, linear.shape[0], generator=draw)
        divergences = []
        for each in noise:
            handle = linear.module.register_forward_hook(lambda _, args, out, each=each: out + each)
            with torch.no_grad():
                off = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
            handle.remove()
            divergences.append((dense.exp() * (dense - off)).sum().item())
        expected = 0.5 * size**2 * grad_sq.sum().item()
        assert sum(divergences) / len(divergences) == pytest.approx(expected, rel=0.25)


def test_everything_is_on_one_device() -> None:
    runner, ids = runner_of(tiny.tiny_llama().requires_grad_(False)), windows(2)
    found = sensed(runner, ids, torch.rand(ids.shape), 2)
    assert {one.grad_sq.device for one in found.values()} == {CPU}
    assert decoder_blocks(runner.model)[1] is runner.blocks
