"""Packed checkpoints, linears and embeddings: saved, sharded, loaded, damaged, unpacked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import PACKED, call, prune_, runner_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lib.commands.unpack import main as unpack_main
from lib.commands.unpack import unpack_folder
from lib.methods.sparsity import Sparsity
from lib.model.skeleton import decoder_blocks
from lib.packed.checkpoint import pack_embeddings_
from lib.packed.embedding import PackedEmbedding, PackedHead, dense_rows, quantize_rows
from lib.packed.errors import PackedError, PackedWarning
from lib.packed.linear import SparseLinear, multiplying
from lib.sparse import pack_, swap_linears_

IDS = torch.arange(3, 15)[None]
BITS = [16, 4]
ON_DISK = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
TIED = {"Llama": False, "Phi": False, "Gemma 3": True, "GPT-2": True}  # Phi's head has a bias
# without the kernels, which are compared with this in tests of their own
pytestmark = pytest.mark.usefixtures("without_kernels")


TWO_OF_FOUR = Sparsity(0.5, 2, 4)


def pruned(model: PreTrainedModel, sparsity: Sparsity = TWO_OF_FOUR) -> PreTrainedModel:
    prune_(model.eval().requires_grad_(False), "magnitude", sparsity)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense 2:4 Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("dense")
    pruned(tiny.ARCHITECTURES["Llama"]()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same one packed, by bits, in many shards."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.packed.kernels.ready", lambda: False)
        for bits in BITS:
            model = load(dense)
            swap_linears_(runner_of(model), PACKED[bits])
            folders[bits] = tmp_path_factory.mktemp(f"packed{bits}")
            model.save_pretrained(folders[bits], max_shard_size="8KB")
    return folders


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def on_grid(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model with the weights that the packed one stands for."""
    linears = [m for m in decoder_blocks(model)[1].modules() if isinstance(m, nn.Linear)]
    for linear in linears if bits == 4 else ():
        weight = linear.weight.bfloat16()
        rounded = PACKED[4].round_to(weight, PACKED[4].fit_scales(weight))
        linear.weight.data = rounded.to(dtype)
    return model


def same_files(one: Path, other: Path) -> bool:
    names = [path.name for path in one.iterdir()]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("bits", BITS)
def test_loads_sharded_with_the_same_outputs(dense, packed, bits: int, tmp_path: Path) -> None:
    """Also offloaded; saved again it is the same."""
    assert len(list(packed[bits].glob("*.safetensors"))) > 3
    for options in ({}, {"device_map": "cpu", "dtype": torch.float32}):
        model = load(packed[bits], **options)
        assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 14
        dtype = options.get("dtype", torch.bfloat16)
        assert torch.equal(logits(model), logits(on_grid(load(dense, dtype=dtype), bits, dtype)))
        assert not any(p.requires_grad for p in model.parameters())
    model = load(packed[bits])
    model.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert same_files(packed[bits], tmp_path / "again")
    away = load(packed[bits], device_map=ON_DISK, offload_folder=tmp_path / "away")
    assert torch.equal(logits(away), logits(model))


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [("GPT-2", TWO_OF_FOUR), ("GPT-2", Sparsity(0.7)), ("Mixtral", Sparsity(0.7))],
)
def test_other_architectures(name: str, sparsity: Sparsity, tmp_path: Path) -> None:
    model = pruned(tiny.ARCHITECTURES[name](), sparsity)
    model.save_pretrained(tmp_path / "dense")
    before = logits(model)
    swap_linears_(runner_of(model))
    model.save_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(load(tmp_path / "packed")), before)
    unpack_folder(str(tmp_path / "packed"), str(tmp_path / "unpacked"))
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("dense", "unpacked"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("bits", BITS)
def test_unpacked_gives_the_dense_checkpoint(dense, packed, bits: int, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "new" / "out"
    load(packed[bits]).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("a card of one's own")
    assert call(source, out, program=unpack_main).status == 0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "README.md").read_text() == "a card of one's own"
    model = on_grid(load(dense), bits, torch.bfloat16)
    again, plain = load(out).state_dict(), model.state_dict()
    assert again.keys() == plain.keys() and all(torch.equal(again[k], plain[k]) for k in plain)
    assert (out / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    for argv, words in (([dense, tmp_path / "x"], "not packed"), ([packed[bits], source], "new")):
        done = call(*argv, program=unpack_main)
        assert done.status == 1 and words in done.complaints[0] and not (tmp_path / "x").exists()


def test_on_a_processor_without_kernels_it_becomes_dense(packed, tmp_path: Path, monkeypatch):
    """With one line; it can be saved, and unpacked."""
    expected = load(packed[4]).dequantize()
    monkeypatch.setattr("lib.packed.kernels.supported", lambda: False)
    with pytest.warns(PackedWarning, match="packed weights become dense"):
        model = load(packed[4])
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    model.save_pretrained(tmp_path / "saved")
    unpack_folder(str(packed[4]), str(tmp_path / "unpacked"))
    for name in ("saved", "unpacked"):
        assert torch.equal(logits(load(tmp_path / name)), logits(expected))


# --- embedding and head as int8: against the rounded matrices, tied or not


def with_embeddings(kind: str) -> PreTrainedModel:
    model = pruned(tiny.ARCHITECTURES[kind]())
    pack_(runner_of(model), PACKED[4], IDS)
    return model


@pytest.mark.parametrize("kind", TIED)
def test_a_model_computes_with_the_rounded_rows(kind: str) -> None:
    """Also where the embedding's class scales what it looks up."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense, model = (tiny.ARCHITECTURES[kind]().eval().to(dtype) for _ in range(2))
        assert len(pack_embeddings_(model)) == 2
        weights = {id(m.weight): m.weight for m in (dense.get_input_embeddings(), dense.lm_head)}
        assert (len(weights) == 1) == TIED[kind]
        for weight in weights.values():
            weight.data = dense_rows(*quantize_rows(weight.detach())).to(weight.dtype)
        expected = logits(dense)
        with multiplying(model, "dense"):
            torch.testing.assert_close(logits(model), expected)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(logits(model), expected, rtol=8 * eps, atol=16 * eps)
        with multiplying(model, "decoding"):
            torch.testing.assert_close(logits(model), expected, rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("kind", TIED)
def test_embeddings_are_saved_loaded_cast_and_unpacked(kind: str, tmp_path: Path) -> None:
    model, one = with_embeddings(kind), tmp_path / "one"
    model.save_pretrained(one)
    tensors = load_file(one / "model.safetensors").values()
    assert sum(tensor.dtype == torch.int8 for tensor in tensors) == (1 if TIED[kind] else 2)
    again = load(one)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedHead)
    assert (head.weight is embedding.weight) == head.tied == TIED[kind]
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    assert same_files(one, tmp_path / "two")
    half, cast = load(one, dtype=torch.bfloat16), again.to(torch.bfloat16)
    assert logits(half).dtype == logits(cast).dtype == torch.bfloat16
    assert half.get_output_embeddings().scale.dtype == torch.float32
    assert torch.equal(cast.lm_head.scale, half.lm_head.scale)
    again = load(one)
    again.dequantize()
    dense = again.get_input_embeddings()
    assert (dense.weight is again.get_output_embeddings().weight) == TIED[kind]
    assert type(dense) is type(tiny.ARCHITECTURES[kind]().get_input_embeddings())
    assert dense.padding_idx == model.get_input_embeddings().padding_idx
    torch.testing.assert_close(logits(again), logits(model))


class Head(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_what_is_packed_and_what_stays_is_told(capsys: pytest.CaptureFixture) -> None:
    runner = runner_of(pruned(tiny.tiny_llama()))
    record = pack_(runner, PACKED[4], IDS)["packed_embeddings"]
    assert record["bits"] == 8 and record["modules"] == ["model.embed_tokens", "lm_head"]
    assert record["bytes"] == 2 * 320 * (32 + 4) and record["dense_bytes"] == 2 * 320 * 32 * 4
    assert 0 < record["difference"] < 0.1
    runner = runner_of(pruned(tiny.tiny_llama()))
    head, query = runner.model.lm_head, runner.blocks[0].self_attn.q_proj
    runner.model.lm_head = Head(32, 320, bias=False)
    runner.model.lm_head.weight = head.weight
    query.weight[query.weight == 0] = 1
    figures, out = pack_(runner, PACKED[4], IDS), capsys.readouterr().out
    assert figures["packed"]["linears"] == 13 and "packed_embeddings" not in figures
    assert "1 left dense" in out and "a head of class Head" in out
    assert type(runner.model.lm_head) is Head


# --- damage

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
CONFIGS = [
    (dict(version=1), "version 1"),
    (dict(format="packed-1:4"), "packed-1:4"),
    (dict(linears={UP: [64, 32, 2049]}), "out, in, kept"),
    (dict(linears={UP: [64, 32, 1000]}), "(1024,), not (1000"),
    (dict(linears={UP: [64, 64, 1024]}), "config.json of this model"),
    (dict(linears={"model.layers.7.mlp.up_proj": [64, 32, 1024]}), "of this model"),
    (dict(bits=8), "bits 8"),
    (dict(bits=4), "'group': None"),
    (dict(bits=4, group=64), "not (512,"),
    (dict(new=1), "'new': 1"),
    (dict(embeddings={"lm_head": [320, 32]}), "embeddings"),
    (dict(embeddings={"lm_head": [320, 32], "model.embed_tokens": [320, 31]}), "embeddings"),
    (dict(embeddings={"lm_head": [320, 32], "model.norm": [320, 32]}), "embeddings"),
]
TENSORS = [  # of a checkpoint with these bits (8: and embeddings): what is done to which
    (16, f"{DOWN}.weight", lambda t: t[:8].clone(), "(8,), not (1024,)"),
    (16, f"{DOWN}.mask", lambda t: t[:, :3].contiguous(), "(32, 3), not (32, 8)"),
    (16, f"{DOWN}.mask", lambda t: None, f"lacks {DOWN}.mask"),
    (4, f"{DOWN}.scale", lambda t: t.float(), "torch.float32, not torch.bfloat16"),
    (4, f"{DOWN}.mask", lambda t: t | 255, "keeps 2048 weights, of 1024"),
    (8, "lm_head.weight", lambda t: t[:5].clone(), "(5, 32), not (320, 32)"),
    (8, "lm_head.weight", lambda t: t.float(), "torch.float32, not torch.int8"),
    (8, "lm_head.scale", lambda t: t.half(), "torch.float16, not torch.float32"),
    (8, "lm_head.scale", lambda t: t / 0, "not finite"),
    (8, "lm_head.scale", lambda t: None, "lacks lm_head.scale"),
]


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Packed checkpoints in one file; 8: with embeddings too."""
    folders = {bits: tmp_path_factory.mktemp("whole") for bits in (16, 8, 4)}
    for bits, folder in folders.items():
        model = with_embeddings("Llama") if bits == 8 else load(packed[bits])
        model.save_pretrained(folder)
    return folders


@pytest.fixture
def damaged(whole: dict[int, Path], tmp_path: Path) -> Callable[..., Path]:
    """Changes a tensor or the config of a copy."""

    def damage(kind: int = 16, tensor: str = "", change: Callable | None = None, **config) -> Path:
        tensors = load_file(whole[kind] / "model.safetensors")
        if change:
            tensors[tensor] = change(tensors[tensor])
        held = json.loads((whole[kind] / "config.json").read_text())
        held["quantization_config"] |= config
        (tmp_path / "config.json").write_text(json.dumps(held))
        tensors = {name: t for name, t in tensors.items() if t is not None}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return damage


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(PackedError) as raised:
        load(folder, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_config_that_does_not_fit(damaged, changes: dict, words: str) -> None:
    assert words in refused(damaged(8 if "embeddings" in changes else 16, **changes))


@pytest.mark.parametrize(("bits", "tensor", "change", "words"), TENSORS)
def test_tensors_that_are_wrong(damaged, bits: int, tensor: str, change, words: str) -> None:
    line = refused(damaged(bits, tensor, change))
    assert words in line and tensor.rpartition(".")[0] in line


def test_files_cut_short_or_of_another_kind(damaged) -> None:
    folder = damaged()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 1, 100, 0):
        file.write_bytes(content[:size])
        assert "damaged" in refused(folder)
    file.write_bytes(content)
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert "safetensors" in refused(folder, use_safetensors=False)


@pytest.mark.parametrize("change", [lambda mask: mask | 255, lambda mask: mask & 15])
def test_a_damaged_linear_that_lies_on_disk_is_found_when_it_is_used(
    damaged, change: Callable, tmp_path: Path
) -> None:
    """The line names the linear and its file; nothing is computed with it."""
    folder = damaged(16, f"{DOWN}.mask", change)
    model = load(folder, device_map=ON_DISK, offload_folder=tmp_path / "away")
    with pytest.raises(PackedError, match=f"model.safetensors: {DOWN}: "):
        logits(model)
