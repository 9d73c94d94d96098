"""Embedding and head as int8: against the rounded matrices, tied or not, saved, loaded, damaged."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import prune_, runner_of
from torch import nn
from transformers import AutoModelForCausalLM

from lib.packed.checkpoint import pack_embeddings_
from lib.packed.embedding import PackedEmbedding, PackedHead, dense_rows, quantize_rows
from lib.packed.errors import PackedError
from lib.packed.formats import PACKED
from lib.packed.linear import multiplying
from lib.sparse import pack_

IDS = torch.arange(3, 15)[None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIED = {"Llama": False, "Phi": False, "Gemma 3": True, "GPT-2": True}  # Phi's head has a bias


def pruned(kind):
    runner = runner_of(tiny.ARCHITECTURES[kind]().eval().requires_grad_(False))
    prune_(runner)
    return runner


def packed_model(kind):
    runner = pruned(kind)
    pack_(runner, PACKED[4], IDS)
    return runner.model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def rounded(weight):
    return dense_rows(*quantize_rows(weight.detach())).to(weight.dtype)


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_computes_with_the_rounded_rows(kind, dtype):
    """Also where the embedding's class scales what it looks up."""
    dense = tiny.ARCHITECTURES[kind]().eval().to(dtype)
    packed = tiny.ARCHITECTURES[kind]().eval().to(dtype)
    packed.load_state_dict(dense.state_dict())
    assert len(pack_embeddings_(packed)) == 2
    weights = {id(m.weight): m.weight for m in (dense.get_input_embeddings(), dense.lm_head)}
    assert (len(weights) == 1) == TIED[kind]
    for weight in weights.values():
        weight.data = rounded(weight)
    with multiplying(packed, "dense"):
        torch.testing.assert_close(logits(packed), logits(dense))
    tolerance = dict(rtol=8 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(logits(packed), logits(dense), **tolerance)
    with multiplying(packed, "decoding"):
        torch.testing.assert_close(logits(packed), logits(dense), **tolerance)


@pytest.mark.parametrize("kind", TIED)
def test_saved_loaded_cast_and_unpacked(kind, tmp_path):
    model = packed_model(kind)
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    rows = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert len(rows) == (1 if TIED[kind] else 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedHead)
    assert (head.weight is embedding.weight) == head.tied == TIED[kind]
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert one == two
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert half.get_output_embeddings().scale.dtype == torch.float32
    cast = again.to(torch.bfloat16)
    assert torch.equal(cast.lm_head.scale, half.lm_head.scale)
    assert logits(cast).dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.dequantize()
    dense = again.get_input_embeddings()
    assert (dense.weight is again.get_output_embeddings().weight) == TIED[kind]
    assert type(dense) is type(tiny.ARCHITECTURES[kind]().get_input_embeddings())
    assert dense.padding_idx == model.get_input_embeddings().padding_idx
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("weight", lambda t: t[:5].clone(), "is \\(5, 32\\), not \\(320, 32\\)"),
        ("weight", lambda t: t.float(), "is torch.float32, not torch.int8"),
        ("scale", lambda t: t.half(), "is torch.float16, not torch.float32"),
        ("scale", lambda t: t / 0, "scale is not finite and above 0"),
        ("scale", lambda t: None, "lacks lm_head.scale"),
    ],
)
def test_damage_is_one_line(part, change, word, tmp_path):
    packed_model("Llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"lm_head.{part}"] = change(tensors[f"lm_head.{part}"])
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})
    with pytest.raises(PackedError, match=word) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "lm_head" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "embeddings",
    [
        {"lm_head": [320, 32]},
        {"lm_head": [320, 32], "model.embed_tokens": [320, 31]},
        {"lm_head": [320, 32], "model.norm": [320, 32]},
    ],
)
def test_config_that_does_not_fit(embeddings, tmp_path):
    packed_model("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["embeddings"] = embeddings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedError, match="quantization_config.*embeddings"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Head(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_what_is_packed_and_what_stays_is_told(capsys):
    record = pack_(pruned("Llama"), PACKED[4], IDS)["packed_embeddings"]
    assert record["bits"] == 8 and record["modules"] == ["model.embed_tokens", "lm_head"]
    assert record["bytes"] == 2 * 320 * (32 + 4) and record["dense_bytes"] == 2 * 320 * 32 * 4
    assert 0 < record["difference"] < 0.1
    runner = pruned("Llama")
    head, query = runner.model.lm_head, runner.blocks[0].self_attn.q_proj
    runner.model.lm_head = Head(32, 320, bias=False)
    runner.model.lm_head.weight = head.weight
    query.weight[query.weight == 0] = 1
    figures, out = pack_(runner, PACKED[4], IDS), capsys.readouterr().out
    assert figures["packed"]["linears"] == 13 and "packed_embeddings" not in figures
    assert "1 left dense (too few zeros to be smaller packed)" in out
    assert "stay unchanged: LlamaForCausalLM has a head of class Head" in out
    assert type(runner.model.lm_head) is Head
