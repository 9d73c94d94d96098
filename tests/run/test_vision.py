"""Checkpoints that also see: the language part becomes small, the rest comes out bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, loaded, results, succeed, weights
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.pretrained import skeleton

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.filterwarnings("ignore")]
BASE = ["--model", "model", *QUICK, "--calibration_data", "uk", "--save_model", "new"]
PRUNE = ["--sparsity_ratio", "0.5", "--prune_method"]
# every way to change the language part, and every way to hold it
RUNS = {
    "Gemma 3 multimodal": [*PRUNE, "admm", "--quantize", "q4_0", "--recover", 320],
    "Qwen 3.5 multimodal": [*PRUNE, "wanda", "--sparsity_type", "neurons", "--offload", "blocks"],
    "Qwen 3.5 MoE multimodal": [*PRUNE, "reap", "--sparsity_type", "experts"],
    "Qwen3-VL": ["--quantize", "q4_0", "--offload", "blocks"],
    "Mistral 3": [*PRUNE, "magnitude", "--sparsity_type", "2:4", "--replace_sparse_layers"],
    "Llava": ["--trim_vocabulary", *PRUNE, "sparsegpt", "--dtype", "float16"],
    "Idefics 3": [*PRUNE, "wanda", "--recover", 960, "--resume", "blocks"],
    "SmolVLM": [*PRUNE, "sparsegpt", "--offload", "blocks", "--allocation", "uniform"],
}


def write(model: PreTrainedModel) -> dict[str, Tensor]:
    """Save a model in bfloat16, its vision in float32; return the tensors of the vision."""
    unread = skeleton(model.config).unread
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in unread else torch.bfloat16)
    model.config.dtype = torch.bfloat16
    tiny.write_model("model", model)
    tiny.write_texts("uk", test=3)
    stored = weights("model")
    seeing = {name: each for name, each in stored.items() if each.dtype == torch.float32}
    assert 10 < len(seeing) == len(unread) < len(stored)
    return seeing


@pytest.mark.parametrize("name", tiny.VISION)
def test_what_text_does_not_read_comes_out_bit_for_bit(name: str) -> None:
    model = tiny.VISION[name]()
    kind, seeing = type(model), write(model)
    done = succeed(*BASE, *RUNS[name], "--save", "out")
    assert "not used" not in done.err
    saved, before = weights("new"), weights("model")
    for tensor, value in seeing.items():
        if "--replace_sparse_layers" in RUNS[name]:  # names are the model's, of this version
            tensor = f"model.{tensor}"
        assert saved[tensor].dtype == torch.float32 and torch.equal(saved[tensor], value), tensor
    text = before.keys() - seeing.keys()
    assert any(not torch.equal(saved.get(each, before[each] + 1), before[each]) for each in text)
    assert type(loaded("new")) is kind
