"""Neurons of MLPs: found in the config of any architecture, and removed without a trace."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from support import CPU, windows
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib.model.access import Checkpoint
from lib.model.mlp import BlockMlp, MlpLayout, Producer, check_removable, find_mlps, keep_neurons_
from lib.model.pretrained import decoder_blocks, skeleton
from lib.util.errors import UserError

GATED = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
EXPECTED = {
    "Llama": ("intermediate_size", *GATED),
    "Gemma 3": ("intermediate_size", *GATED),
    "Qwen2": ("intermediate_size", *GATED),
    "Phi": ("intermediate_size", ("mlp.fc1",), "mlp.fc2"),
    "GPT-2": ("n_inner", ("mlp.c_fc",), "mlp.c_proj"),
    "GPT-NeoX": ("intermediate_size", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "OPT": ("ffn_dim", ("fc1",), "fc2"),
    "Phi-3": ("intermediate_size", ("mlp.gate_up_proj",), "mlp.down_proj"),
    "Gemma 3 multimodal": ("intermediate_size", *GATED),
}


def layout_of(model: nn.Module) -> MlpLayout:
    bare = skeleton(model.config)
    return find_mlps(model.config, Checkpoint("model"), bare, decoder_blocks(bare)[0])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_linears_of_an_mlp_are_found_by_its_width_in_the_config(name: str) -> None:
    model = tiny.ALL[name]()
    before = model.config.to_dict()
    layout, (field, producers, down) = layout_of(model), EXPECTED[name]
    assert layout.field == field
    assert layout.section == ("text_config" if name == "Gemma 3 multimodal" else None)
    assert len(layout.blocks) == len(decoder_blocks(model)[1])
    for mlp in layout.blocks:
        assert mlp.down == down and tuple(one.path for one in mlp.producers) == producers
        assert {one.parts for one in mlp.producers} == {2 if name == "Phi-3" else 1}
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "BLOOM", "MPT", "Mamba", "Zamba2"])
def test_models_without_such_mlps_are_refused_without_weights(name: str) -> None:
    reason = "are experts" if name in ("Mixtral", "Qwen2-MoE") else "no field of its config"
    with pytest.raises(UserError, match=f"--sparsity_type neurons: --model model: .*{reason}"):
        layout_of(tiny.ALL[name]())


def test_quantised_models_are_refused() -> None:
    model = tiny.tiny_llama()
    bare, config = skeleton(model.config), copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="it is quantised"):
        find_mlps(config, Checkpoint("model"), bare, decoder_blocks(bare)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_without_some_neurons_is_one_that_ignores_them(name: str) -> None:
    """Also: a model made by the narrower config has the same shapes, and the same outputs."""
    model, ids = tiny.ALL[name](), windows(2)
    for parameter in model.parameters():  # biases that are zeros would hide a wrong one
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator(CPU)))
    layout = layout_of(model)
    kept = torch.tensor([0, 3, 4, *range(9, layout.width - 1, 2)])
    ignored = sorted(set(range(layout.width)) - set(kept.tolist()))
    expected = copy.deepcopy(model)
    for block, mlp in zip(decoder_blocks(expected)[1], layout.blocks, strict=True):
        down = block.get_submodule(mlp.down)
        (down.weight if isinstance(down, Conv1D) else down.weight.T)[ignored] = 0
    for block, mlp in zip(decoder_blocks(model)[1], layout.blocks, strict=True):
        keep_neurons_(block, mlp, kept)
    layout.set_width(model.config, len(kept))
    anew = type(model)(model.config).eval()
    anew.load_state_dict(model.state_dict())
    outputs = expected(input_ids=ids, use_cache=False).logits
    for smaller in (model, anew):
        assert torch.allclose(smaller(input_ids=ids, use_cache=False).logits, outputs, atol=1e-5)


class Mixing(nn.Module):
    """An MLP whose neurons are divided by their norm, so that each depends on all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(x)
        return self.down(inner / inner.norm(dim=-1, keepdim=True))


def test_neurons_that_depend_on_each_other_are_noticed() -> None:
    mlp, x = BlockMlp("down", (Producer("up", 1),)), torch.randn(2, 5, 8)
    with pytest.raises(UserError, match="block 0: its MLP does more than multiply by neurons"):
        check_removable(Mixing(), mlp, 32, lambda block: block(x), "block 0")
    plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    check_removable(plain, BlockMlp("2", (Producer("0", 1),)), 32, lambda block: block(x), "")
