"""Neurons of MLPs: found in any architecture that names them, and removed without a trace."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from support import CPU, layout_of, windows
from transformers.pytorch_utils import Conv1D

from lib.methods.sparsity import NEURONS
from lib.model.access import Checkpoint
from lib.model.parts import find_parts, keep_parts_
from lib.model.pretrained import decoder_blocks, skeleton
from lib.util.errors import UserError

EXPERTS = "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GPT-OSS, GraniteMoE, JetMoE, PhiMoE, DeepSeek-V3"
EXPERTS = [*EXPERTS.split(", "), "Jamba", "GraniteMoE hybrid", "Qwen 3.5 MoE multimodal"]
WITHOUT = ["BLOOM", "MPT", "Mamba", "Mamba 2", "Zamba2"]
FOUND = [name for name in tiny.ALL if name not in (*EXPERTS, *WITHOUT)]


@torch.no_grad()
@pytest.mark.parametrize("name", FOUND)
def test_a_model_without_some_neurons_is_one_that_ignores_them(name: str) -> None:
    """Also: a model made by the narrower config has the same shapes, and the same outputs."""
    model, ids = tiny.ALL[name](), windows(2)
    before = model.config.to_dict()
    layout = layout_of(NEURONS, model)
    assert model.config.to_dict() == before
    name, blocks = decoder_blocks(model)
    assert len(layout.modules) == len(blocks)
    for parameter in model.parameters():  # biases that are zeros would hide a wrong one
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator(CPU)))
    kept = torch.tensor([0, 3, 4, *range(9, layout.count - 1, 2)])
    ignored = sorted(set(range(layout.count)) - set(kept.tolist()))
    ignoring = copy.deepcopy(model)
    for block, path in zip(decoder_blocks(ignoring)[1], layout.modules, strict=True):
        down = block.get_submodule(path)
        (down.weight if isinstance(down, Conv1D) else down.weight.T)[ignored] = 0
    for index, block in enumerate(blocks):
        keep_parts_(block, layout, index, f"{name}.{index}", kept)
    setattr(model.config.get_text_config(decoder=True), layout.field, len(kept))
    anew = type(model)(model.config).eval()
    anew.load_state_dict(model.state_dict())
    outputs = ignoring(input_ids=ids, use_cache=False).logits
    for smaller in (model, anew):
        out = smaller(input_ids=ids, use_cache=False).logits
        assert (out - outputs).norm() < 1e-4 * outputs.norm()


@pytest.mark.parametrize("name", [*EXPERTS, *WITHOUT])
def test_models_without_such_mlps_are_refused_without_weights(name: str) -> None:
    reason = "are experts" if name in EXPERTS else "no field of its config"
    with pytest.raises(UserError, match=f"--sparsity_type neurons: --model model: .*{reason}"):
        layout_of(NEURONS, tiny.ALL[name]())


def test_quantized_models_are_refused() -> None:
    model = tiny.tiny_llama()
    bare, config = skeleton(model.config, Checkpoint("model")), copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="it is quantized"):
        find_parts(NEURONS, config, Checkpoint("model"), bare, decoder_blocks(bare)[0])
