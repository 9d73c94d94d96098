"""Packed checkpoints: saved, sharded, loaded, damaged, and unpacked again."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import runner_of
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lib.commands.unpack import main as unpack_main
from lib.commands.unpack import unpack_folder
from lib.methods.sparsity import Sparsity
from lib.model.pretrained import decoder_blocks
from lib.packed.errors import PackedError, PackedWarning
from lib.packed.formats import PACKED
from lib.packed.linear import SparseLinear
from lib.sparse import swap_linears_
from lib.util.command import run

IDS = torch.arange(3, 15)[None]
BITS = [16, 4]
ON_DISK = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
# without the kernels, which are compared with this in tests of their own
pytestmark = pytest.mark.usefixtures("without_kernels")


def pruned(model, pattern="2:4"):
    for linear in (m for m in decoder_blocks(model)[1].modules()):
        if isinstance(linear, nn.Linear | Conv1D) and min(linear.weight.shape) >= 8:
            matrix = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
            if pattern == "2:4":
                matrix[Sparsity(0.5, 2, 4).mask(matrix.abs())] = 0
            else:
                matrix[matrix.abs() < matrix.abs().quantile(0.7)] = 0
    return model.eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense 2:4 Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("dense")
    pruned(tiny.ARCHITECTURES["Llama"]()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same one packed, by bits, in many shards."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.packed.kernels.ready", lambda: False)
        for bits in BITS:
            model = AutoModelForCausalLM.from_pretrained(dense)
            swap_linears_(runner_of(model), PACKED[bits])
            folders[bits] = tmp_path_factory.mktemp(f"packed{bits}")
            model.save_pretrained(folders[bits], max_shard_size="8KB")
    return folders


@pytest.fixture
def damaged(packed, tmp_path):
    """The packed checkpoint in one file, with a tensor or the config changed."""

    def damage(kind=16, tensor=None, change=None, **config):
        folder = tmp_path / "copy"
        load(packed[kind]).save_pretrained(folder)
        if tensor:
            file = folder / "model.safetensors"
            tensors = load_file(file)
            tensors[tensor] = change(tensors[tensor])
            save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})
        held = json.loads((folder / "config.json").read_text())
        held["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(held))
        return folder

    return damage


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def on_grid(model, bits, dtype):
    """The dense model with the weights that the packed one stands for."""
    linears = [m for m in decoder_blocks(model)[1].modules() if isinstance(m, nn.Linear)]
    for linear in linears if bits == 4 else ():
        weight = linear.weight.bfloat16()
        rounded = PACKED[4].round_to(weight, PACKED[4].fit_scales(weight))
        linear.weight.data = rounded.to(dtype)
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu", "dtype": torch.float32}], ids=str)
def test_loads_sharded_with_the_same_outputs(dense, packed, bits, options):
    assert len(list(packed[bits].glob("*.safetensors"))) > 3
    model = load(packed[bits], **options)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 14
    dtype = options.get("dtype", torch.bfloat16)
    assert torch.equal(logits(model), logits(on_grid(load(dense, dtype=dtype), bits, dtype)))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_saved_again_and_offloaded_it_is_the_same(packed, bits, tmp_path):
    model = load(packed[bits])
    model.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    for file in packed[bits].iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    away = load(packed[bits], device_map=ON_DISK, offload_folder=tmp_path / "away")
    assert torch.equal(logits(away), logits(model))


@pytest.mark.parametrize(
    ("name", "pattern"), [("GPT-2", "2:4"), ("GPT-2", "unstructured"), ("Mixtral", "unstructured")]
)
def test_other_architectures(name, pattern, tmp_path):
    model = pruned(tiny.ARCHITECTURES[name](), pattern)
    model.save_pretrained(tmp_path / "dense")
    before = logits(model)
    swap_linears_(runner_of(model))
    model.save_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(load(tmp_path / "packed")), before)
    unpack_folder(str(tmp_path / "packed"), str(tmp_path / "unpacked"))
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("dense", "unpacked"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("bits", BITS)
def test_unpacked_gives_the_dense_checkpoint(dense, packed, bits, tmp_path):
    source, out = tmp_path / "in", tmp_path / "new" / "out"
    load(packed[bits]).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("import packed_bitmask")
    assert run(unpack_main, [str(source), str(out)]) == 0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "README.md").exists()
    model = on_grid(load(dense), bits, torch.bfloat16)
    again, plain = load(out).state_dict(), model.state_dict()
    assert again.keys() == plain.keys() and all(torch.equal(again[k], plain[k]) for k in plain)
    assert (out / "config.json").read_bytes() == (dense / "config.json").read_bytes()


@pytest.mark.parametrize("source, word", [("dense", "not packed"), ("packed", "a new folder")])
def test_unpack_refuses_in_one_line(dense, packed, source, word, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder, target = (dense, tmp_path / "x") if source == "dense" else (packed[16], tmp_path)
    assert run(unpack_main, [str(folder), str(target)]) == 1
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_on_a_processor_without_kernels_it_becomes_dense(packed, tmp_path, monkeypatch):
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


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"version": 1}, "version 1"),
        ({"format": "packed-1:4"}, "packed-1:4"),
        ({"linears": {UP: [64, 32, 2049]}}, "out, in, kept"),
        ({"linears": {UP: [64, 32, 1000]}}, "is \\(1024,\\), not \\(1000"),
        ({"linears": {UP: [64, 64, 1024]}}, "config.json of this model"),
        ({"linears": {"model.layers.7.mlp.up_proj": [64, 32, 1024]}}, "of this model"),
        ({"bits": 8}, "bits 8, and only"),
        ({"bits": 4}, "'group': None"),
        ({"bits": 4, "group": 64}, "not \\(512,"),
        ({"new": 1}, "'new': 1"),
    ],
)
def test_config_that_does_not_fit(damaged, changes, word):
    with pytest.raises(PackedError, match=word) as raised:
        load(damaged(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "bits, part, change, word",
    [
        (16, "weight", lambda t: t[:8].clone(), "is \\(8,\\), not \\(1024,\\)"),
        (16, "mask", lambda t: t[:, :3].contiguous(), "is \\(32, 3\\), not \\(32, 8\\)"),
        (16, "mask", lambda t: None, f"lacks {DOWN}.mask"),
        (4, "scale", lambda t: t.float(), "is torch.float32, not torch.bfloat16"),
        (4, "mask", lambda t: t | 255, "keeps 2048 weights, of 1024"),
    ],
)
def test_tensors_that_are_wrong(damaged, bits, part, change, word):
    folder = damaged(bits, f"{DOWN}.{part}", change)
    with pytest.raises(PackedError, match=word) as raised:
        load(folder)
    assert DOWN in str(raised.value) and "\n" not in str(raised.value)


def test_files_cut_short_or_of_another_kind(damaged):
    folder = damaged()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(PackedError, match="it is damaged"):
            load(folder)
    file.write_bytes(whole)
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(PackedError, match="only safetensors"):
        load(folder, use_safetensors=False)


@pytest.mark.parametrize("change", [lambda mask: mask | 255, lambda mask: mask & 15])
def test_a_damaged_linear_that_lies_on_disk_is_found_when_it_is_used(damaged, change, tmp_path):
    """The line names the linear and its file; nothing is computed with it."""
    folder = damaged(16, f"{DOWN}.mask", change)
    model = load(folder, device_map=ON_DISK, offload_folder=tmp_path / "away")
    with pytest.raises(PackedError, match=f"model.safetensors: {DOWN}: packed mask keeps"):
        logits(model)
