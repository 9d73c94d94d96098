"""Whole models whose linears are swapped: what is packed, what stays, what is refused."""

import copy

import pytest
import tiny
import torch
from support import packed_weights, prune_, runner_of, windows
from torch import nn

from lib import sparse
from lib.packed import kernels
from lib.packed.embedding import PackedEmbedding
from lib.packed.formats import PACKED
from lib.packed.linear import SparseLinear
from lib.sparse import pack_, swap_linears_
from lib.util.errors import UserError

WINDOW = windows(1)
BITS = [16, 4]


def pruned(name="Llama", dtype=torch.float32):
    runner = runner_of(tiny.ARCHITECTURES[name]().eval().to(dtype).requires_grad_(False))
    prune_(runner, "magnitude")
    return runner


@torch.no_grad()
def logits(runner):
    return runner.model(WINDOW).logits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("built", [True, False])
def test_outputs_stay_and_the_record_tells_sizes(bits, built, monkeypatch, capsys):
    if not built:
        monkeypatch.setattr(kernels, "ready", lambda: False)
    runner = pruned()
    dense = runner.blocks[0].self_attn.q_proj
    dense.weight[dense.weight == 0] = 1  # the first is not sparse
    before = logits(runner)
    figures = pack_(runner, PACKED[bits], WINDOW)
    packed, out = figures["packed"], capsys.readouterr().out
    assert packed["bits"] == bits and packed["linears"] == 13
    linears = [m for m in runner.model.modules() if isinstance(m, SparseLinear)]
    held = [part.nbytes for m in linears for part in m.packed if part is not None]
    assert packed["bytes"] == sum(held) < packed["dense_bytes"]
    way = "by the kernels for packed" if built and kernels.ready() else "unpacked at each forward"
    at = " at 4 bits" if bits == 4 else ""
    assert out.startswith(f"packed linears{at}: 13 {way}")
    assert "1 left dense (too few zeros to be smaller packed)" in out and "footprint" in out
    assert ("packed_embeddings" in figures) == (bits == 4)
    difference = sparse.relative_difference(before, logits(runner))
    assert difference < 1e-5 if bits == 16 else 0 < difference < 0.5


def test_embedding_and_head_are_packed_where_they_can_be(capsys):
    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    runner = pruned()
    record = pack_(runner, PACKED[4], WINDOW)["packed_embeddings"]
    assert record["bits"] == 8 and record["modules"] == ["model.embed_tokens", "lm_head"]
    assert record["bytes"] == 2 * 320 * (32 + 4) and record["dense_bytes"] == 2 * 320 * 32 * 4
    assert 0 < record["difference"] < 0.1
    assert isinstance(runner.model.get_input_embeddings(), PackedEmbedding)
    runner = pruned()
    head = runner.model.lm_head
    runner.model.lm_head = Head(32, 320, bias=False)
    runner.model.lm_head.weight = head.weight
    assert "packed_embeddings" not in pack_(runner, PACKED[4], WINDOW)
    assert "stay as they are: LlamaForCausalLM has a head of class Head" in capsys.readouterr().out
    assert type(runner.model.lm_head) is Head


@torch.no_grad()
def test_scales_of_another_matrix_are_refused():
    """What was trained on a grid is packed as it is, or not at all."""
    runner, scales = pruned(), {}
    for name in packed_weights(runner):
        weight = runner.model.get_parameter(name)
        weight *= 1 + 0.2 * torch.rand(weight.shape)
        scales[name] = PACKED[4].fit_scales(weight) * 1.125
        weight.copy_(PACKED[4].round_to(weight, scales[name]))
    other = runner_of(copy.deepcopy(runner.model))
    weights = {name: runner.model.get_parameter(name).clone() for name in scales}
    swap_linears_(runner, PACKED[4], scales)
    for name, weight in weights.items():
        module = runner.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.dense(), weight) and torch.equal(module.scale, scales[name])
    scales["model.layers.1.mlp.up_proj.weight"] *= 2
    with pytest.raises(UserError, match="int4: model.layers.1.mlp.up_proj is not what was packed"):
        swap_linears_(other, PACKED[4], scales)
