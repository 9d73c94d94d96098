"""Checkpoints that also see: the language part becomes small, the rest comes out bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, loaded, succeed, weights, windows
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.filterwarnings("ignore")]
BASE = ["--model", "model", *QUICK, "--calibration_data", "uk", "--save_model", "new"]
PRUNE = ["--sparsity_ratio", "0.5", "--prune_method"]
# every way to change the language part, and every way to hold it
RUNS = {
    "Gemma 3 multimodal": [*PRUNE, "admm", "--quantize", "q4_0", "--recover", 320],
    "Qwen 3.5 multimodal": [
        *PRUNE,
        "wanda",
        "--sparsity_type",
        "neurons",
        "--offload_folder",
        "blocks",
    ],
    "Qwen 3.5 MoE multimodal": [*PRUNE, "reap", "--sparsity_type", "experts"],
    "Qwen3-VL": ["--quantize", "q4_0", "--offload_folder", "blocks"],
    "Mistral 3": [*PRUNE, "magnitude", "--sparsity_type", "2:4", "--replace_sparse_layers"],
    "Llava": [*PRUNE, "sparsegpt", "--dtype", "float16"],
    "Idefics 3": [*PRUNE, "wanda", "--recover", 960, "--resume", "blocks"],
    "SmolVLM": [*PRUNE, "sparsegpt", "--offload_folder", "blocks", "--allocation", "uniform"],
}


def write(model: PreTrainedModel) -> dict[str, Tensor]:
    """Save a model in bfloat16, its vision in float32; return the tensors of the vision."""
    parts = model.get_decoder(), model.get_output_embeddings()
    text = {parameter for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if parameter in text else torch.float32)
    model.config.dtype = torch.bfloat16
    tiny.write_model("model", model)
    tiny.write_texts("uk", test=3)
    stored = weights("model")
    seeing = {name: each for name, each in stored.items() if each.dtype == torch.float32}
    assert 10 < len(seeing) < len(stored)
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


@pytest.mark.parametrize("name", [name for name in tiny.VISION if name != "Qwen3-VL"])
def test_the_text_alone_if_asked(name: str) -> None:
    seeing = write(tiny.VISION[name]())
    done = succeed(*BASE, "--eval_only", "--text_only")
    text, whole = loaded("new"), loaded("model")
    assert type(text) is AutoModelForCausalLM._model_mapping[type(whole.config.get_text_config())]
    assert f"left out, {len(seeing)} tensors" in done.out
    with torch.no_grad():
        expected, found = (model(input_ids=windows(3)).logits for model in (whole, text))
    torch.testing.assert_close(found, expected)
    assert len(weights("new")) + len(seeing) == len(weights("model"))
    card = Path("new/README.md").read_text("utf-8")
    assert "are left out" in card and "AutoModelForCausalLM" in card


def test_what_has_no_text_alone() -> None:
    write(tiny.VISION["Qwen3-VL"]())
    done = call(*BASE, "--eval_only", "--text_only")
    assert done.status == 1 and "transformers has no class for only the text" in done.complaints[0]
    tiny.write_model("text")
    done = call(*BASE, "--model", "text", "--eval_only", "--text_only")
    assert "--text_only: --model text has no other parts" in done.complaints[0]


INSIDE = dict(cross_attention_layers=[1], num_hidden_layers=3)
READERS = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
READERS |= dict(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: tiny.vision(
                "mllama", INSIDE, tiny.TOWER | tiny.TILES, image_token_index=tiny.IMAGE
            ),
            "(MllamaForConditionalGeneration): it has no lists of decoder blocks that process text",
        ),
        (
            lambda: WhisperForConditionalGeneration(WhisperConfig(**READERS)),
            "it is an encoder-decoder model (whisper). Name a causal language model.",
        ),
    ],
)
def test_blocks_that_read_more_than_text_are_refused(make: Callable, said: str) -> None:
    tiny.write_model("model", make())
    tiny.write_texts("uk", test=3)
    done = call(*BASE, "--prune_method", "wanda")
    assert done.status == 1 and len(done.complaints) == 1 and said in done.complaints[0]
    assert not Path("new").exists()
