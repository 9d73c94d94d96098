"""Squared gradients of the sampled loss at the linears' outputs, against autograd's."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import runner_of, windows
from torch import Tensor

from lib.model.blocks import BlockRunner
from lib.model.linears import experts_implementation, watch_outputs
from lib.pruning.fisher import FisherDiagonal, backward_pass, draw

MODELS = ("Llama", "GPT-2", "Gemma 2", "Mixtral", "Falcon", "GPT-OSS", "Mamba", "Zamba2")


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
    """{linear's name: sums of squares of its inputs and of grad_sq, tokens}, window by window."""
    model, found = runner.model, {}
    linears = [one for index in range(len(runner.blocks)) for one in runner.linears(index)]
    outputs: list[tuple] = []

    def see(linear, x: Tensor, out: Tensor) -> None:
        out.retain_grad()
        outputs.append((linear.name, x.detach(), out))

    for window, drawn in zip(ids, uniforms, strict=True):
        outputs.clear()
        with experts_implementation(model, "eager"), watch_outputs(linears, see):
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


@pytest.mark.parametrize("vocabulary", [10, 1024, 2500])
def test_labels_are_drawn_by_the_cumulative_probability(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(2, 50, vocabulary, generator=generator)).softmax(-1)
    uniforms = torch.rand(2, 50, generator=generator)
    labels = draw(p, uniforms).squeeze(-1)
    ends = p.double().cumsum(-1)
    after = ends.gather(-1, labels[..., None]).squeeze(-1)
    before = after - p.gather(-1, labels[..., None]).squeeze(-1)
    assert ((before - 1e-5 <= uniforms) & (uniforms <= after + 1e-5)).all()
    assert (draw(p, torch.zeros(2, 50)) == 0).all()
    assert (draw(p, torch.ones(2, 50)) < vocabulary).all()


@pytest.mark.parametrize("name", MODELS)
def test_as_autograd_through_the_whole_model(name: str) -> None:
    model = tiny.ALL[name]().requires_grad_(False)
    runner, ids = runner_of(model), windows(3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    uniforms = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    expected = by_autograd(runner, ids, uniforms)
    assert expected
    for batch_size in (1, 2):
        found = sensed(runner, ids, uniforms, batch_size)
        for linear, one in found.items():
            inputs, grad_sq, tokens = expected.get(linear, (0, 0, 0))
            assert one.tokens == tokens, linear
            assert torch.allclose(one.inputs, one.inputs.new_zeros(()) + inputs, rtol=1e-3)
            grad_sq = one.grad_sq.new_zeros(()) + grad_sq
            assert torch.allclose(one.grad_sq, grad_sq, rtol=1e-2, atol=1e-7), linear
        assert any(one.grad_sq.any() for one in found.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
