"""Packed checkpoints: saved, sharded, loaded in fresh processes, damaged, and unpacked again."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import start, wait_until
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lib.sparse
from lib.methods.sparsity import n_of_m
from lib.model.pretrained import decoder_blocks
from lib.commands.unpack import main as unpack_main
from lib.commands.unpack import unpack_folder
from lib.packed import kernels
from lib.packed.checkpoint import CARD_HEADING, METHOD, PackedConfig
from lib.packed.errors import PackedError
from lib.packed.grid import dequantise, quantise
from lib.packed.linear import SparseLinear
from lib.util.command import run
from lib.util.folders import MANIFEST

IDS = torch.arange(3, 15)[None]


def prune_(model, pattern="2:4"):
    for linear in (m for m in decoder_blocks(model)[1].modules()):
        if isinstance(linear, nn.Linear | Conv1D) and min(linear.weight.shape) >= 8:
            matrix = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
            if pattern == "2:4":
                matrix[n_of_m(matrix.abs(), 2, 4)] = 0
            else:
                matrix[matrix.abs() < matrix.abs().quantile(0.7)] = 0
    return model.eval()


@pytest.fixture(autouse=True)
def slow_path(monkeypatch):
    """Without the kernels, which are compared with it in tests of their own."""
    monkeypatch.setattr(kernels, "ready", lambda: False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense 2:4 Llama in bfloat16, and the same one packed, in many shards."""
    dense, packed = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("packed")
    prune_(tiny.ARCHITECTURES["Llama"]()).to(torch.bfloat16).save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense)
    lib.sparse.swap_linears_(model, model.model.layers)
    model.save_pretrained(packed, max_shard_size="8KB")
    return dense, packed


@pytest.fixture(scope="module")
def eight(folders, tmp_path_factory):
    """The same one packed at 8 bits, in many shards."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    lib.sparse.swap_linears_(model, model.model.layers, bits=8)
    model.save_pretrained(folder := tmp_path_factory.mktemp("eight"), max_shard_size="8KB")
    return folder


@pytest.fixture(scope="module")
def four(folders, tmp_path_factory):
    """The same one packed at 4 bits, with a scale for every 32 inputs, in many shards."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    lib.sparse.swap_linears_(model, model.model.layers, bits=4, group=32)
    model.save_pretrained(folder := tmp_path_factory.mktemp("four"), max_shard_size="8KB")
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """The packed checkpoint in one file, to be damaged."""
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    model.save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def same_files(a, b):
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir() if p.name != MANIFEST)
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_loads_sharded_with_the_same_outputs(folders, options):
    dense, packed = folders
    assert len(list(packed.glob("*.safetensors"))) > 3
    model = load(packed, **options)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 14
    assert torch.equal(logits(model), logits(load(dense)))
    assert not any(p.requires_grad for p in model.parameters())


def test_saved_again_gives_the_same_bytes(folders, eight, four, tmp_path):
    for folder, name in ((folders[1], "again"), (eight, "again8"), (four, "again4")):
        load(folder).save_pretrained(tmp_path / name, max_shard_size="8KB")
        assert same_files(folder, tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_load_in_any_dtype_with_the_very_scales(folders, eight, dtype):
    dense, model = load(folders[0], dtype=dtype), load(eight, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert module.weight.dtype == torch.int8 and module.scale.dtype == torch.float32
            weight = dense.get_submodule(name).weight
            largest = weight.bfloat16().float().abs().amax(1)
            assert torch.equal(module.scale, largest / 127) and module.dtype == dtype
            dense.get_submodule(name).weight.data = module.dense()
    assert torch.equal(logits(model), logits(dense))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_load_in_any_dtype(folders, four, dtype):
    dense, model = load(folders[0], dtype=dtype), load(four, dtype=dtype)
    assert model.config.quantization_config.group == 32
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert module.weight.dtype == torch.uint8 and module.scale.dtype == torch.bfloat16
            weight = dense.get_submodule(name).weight
            codes, scales = quantise(weight.bfloat16(), None, 4, 32)
            assert torch.equal(module.scale, scales) and module.dtype == dtype
            weight.data = dequantise(codes, scales, 32).to(dtype)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_unpacked_to_the_rounded_model(eight, four, bits, tmp_path):
    folder = eight if bits == 8 else four
    unpack_folder(str(folder), str(tmp_path / "out"))
    model = load(tmp_path / "out")
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    assert torch.equal(logits(model), logits(load(folder)))
    packed = load(folder)
    for name, module in packed.named_modules():
        if isinstance(module, SparseLinear):
            weight = model.get_submodule(name).weight
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, module.dense())


def test_packed_linears_take_nine_sixteenths(folders):
    dense, model = load(folders[0]), load(folders[1])
    linears = {n: m for n, m in dense.model.layers.named_modules() if isinstance(m, nn.Linear)}
    before = sum(m.weight.nbytes for m in linears.values())
    packed = [model.model.layers.get_submodule(name) for name in linears]
    assert sum(m.weight.nbytes + m.mask.nbytes for m in packed) * 16 == 9 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loads_in_another_dtype(folders, dtype):
    dense, model = load(folders[0], dtype=dtype), load(folders[1], dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_offloaded_to_disk(folders, eight, four, tmp_path, bits):
    folder = {16: folders[1], 8: eight, 4: four}[bits]
    device_map = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb")}
    device_map |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(load(folder)))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Gemma 2", "Qwen3"])
def test_other_architectures(name, pattern, tmp_path):
    model = prune_(tiny.ARCHITECTURES[name](), pattern)
    model.save_pretrained(tmp_path / "dense")
    before = logits(model)
    lib.sparse.swap_linears_(model, decoder_blocks(model)[1])
    model.save_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(load(tmp_path / "packed")), before)
    unpack_folder(str(tmp_path / "packed"), str(tmp_path / "unpacked"))
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("dense", "unpacked"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_unpacked_gives_the_dense_checkpoint(folders, tmp_path):
    dense, packed = folders
    (packed / "tokenizer.json").write_text("{}")
    (packed / "README.md").write_text(
        f"# A model, pruned\n\nA table.\n\n{CARD_HEADING}\n\n"
        "```python\nimport packed_bitmask  # this\n```\n## After\n\nMore.\n"
    )
    out = tmp_path / "new" / "out"
    assert run(unpack_main, [str(packed), str(out)]) == 0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "README.md").read_text() == (
        "# A model, pruned\n\nA table.\n\n## After\n\nMore.\n\n## Weights\n\n"
        "Unpacked from a packed checkpoint: zeros are stored as weights.\n"
    )
    for name in ("tokenizer.json", "README.md"):
        (out / name).unlink()
        (packed / name).unlink()
    assert same_files(dense, out)


def test_unpack_refuses_in_one_line(folders, tmp_path, capsys):
    dense, packed = folders
    for source, target, word in (
        (tmp_path, tmp_path / "x", "no config.json"),
        (dense, tmp_path / "x", "not a packed checkpoint"),
        (packed, tmp_path, "exists"),
    ):
        assert run(unpack_main, [str(source), str(target)]) == 1
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"version": 1}, "version 1"),
        ({"format": "packed-1:4"}, "packed-1:4"),
        ({"blocks": 3}, "blocks"),
        ({"linears": ["a"]}, "damaged"),
        ({"linears": {"model.layers.0.mlp.up_proj": [64, 32]}}, "out, in, kept"),
        ({"linears": {"model.layers.0.mlp.up_proj": [64, 32, -1]}}, "out, in, kept"),
        ({"linears": {"model.layers.0.mlp.up_proj": [64, 32, 2049]}}, "out, in, kept"),
        ({"linears": {"model.layers.0.mlp.up_proj": [64, 32, 1.0]}}, "out, in, kept"),
        (
            {"linears": {"model.layers.0.mlp.up_proj": [64, 32, 1000]}},
            "is \\(1024,\\), not \\(1000",
        ),
        ({"linears": {"model.layers.0.mlp.up_proj": [64, 64, 1024]}}, "another checkpoint"),
        ({"linears": {"model.layers.7.mlp.up_proj": [64, 32, 1024]}}, "another model"),
        ({"linears": {"model.layers.0.mlp": [64, 32, 1024]}}, "another model"),
        ({"bits": 3}, "`bits` is 3"),
        ({"bits": 4}, "`group` is None, not 32"),
        ({"bits": 4, "group": 48}, "`group` is 48, not 32"),
        ({"group": 64}, "which 16 bits have not"),
        ({"bits": 4, "group": 64}, "not \\(512,"),
        ({"bits": 8}, "is BF16, not I8"),
    ],
)
def test_config_that_does_not_fit(copy, changes, word):
    edit_config(copy, **changes)
    with pytest.raises(PackedError, match=word):
        load(copy)


def test_files_cut_short_or_incomplete(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(PackedError, match="cut short or damaged"):
            load(copy)
    file.write_bytes(whole)
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.mask"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PackedError, match="lacks 1 packed tensors"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("weight", lambda t: t[:8].clone(), "is \\(8,\\), not \\(1024,\\)"),
        ("weight", lambda t: t.to(torch.int8), "is I8, not BF16"),
        ("mask", lambda t: t[:, :3].contiguous(), "is \\(64, 3\\), not \\(64, 4\\)"),
        ("mask", lambda t: t.to(torch.int32), "is I32, not U8"),
        ("mask", lambda t: t * 0, "keeps 0 weights, of 1024"),
        ("mask", lambda t: t | 255, "keeps 2048 weights, of 1024"),
    ],
)
def test_tensors_that_are_wrong(copy, part, change, word):
    file, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PackedError, match=f"{name}.*{word}") as told:
        load(copy)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t[:5].clone(), "is \\(5,\\), not \\(64,\\)"),
        (lambda t: t.half(), "is F16, not F32"),
        (lambda t: t * 0, "above 0"),
        (lambda t: t / 0, "not finite"),
    ],
)
def test_scales_that_are_wrong(eight, tmp_path, change, word):
    load(eight).save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.scale"] = change(tensors[f"{name}.scale"])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PackedError, match=f"{name}.*{word}"):
        load(tmp_path)


def more_bits(tensors, name):
    tensors[f"{name}.mask"] |= 255


def fewer_bits(tensors, name):
    tensors[f"{name}.mask"] &= 15


@pytest.mark.parametrize("damage", [more_bits, fewer_bits])
@pytest.mark.parametrize("there", ["disk", "meta"])
def test_a_damaged_linear_that_lies_on_disk_is_found_when_it_is_used(copy, damage, there, tmp_path):
    """The line names the linear and its file; nothing is computed with it."""
    file, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    damage(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    if there == "disk":
        device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
        device_map |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        model = load(copy, device_map=device_map, offload_folder=tmp_path)
        with pytest.raises(PackedError, match=f"model.safetensors: {name}: packed mask keeps"):
            logits(model)
    else:  # as where another loader fills the module in later
        packed = SparseLinear.from_linear(nn.Linear(32, 64)).to("meta")
        packed.checked, packed.source = False, name
        for part in ("weight", "mask"):
            tensor = tensors[f"{name}.{part}"]
            tensor = nn.Parameter(tensor, requires_grad=False) if part == "weight" else tensor
            setattr(packed, part, tensor)
        packed.nnz = len(packed.weight)
        with pytest.raises(PackedError, match=f"{name}: packed mask keeps"):
            packed(torch.randn(1, 32).bfloat16())
        with pytest.raises(PackedError, match=f"{name}: packed mask keeps"):
            packed.dense()


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("scale", lambda t: t[:, :1].clone(), "is \\(32, 1\\), not \\(32, 2\\)"),
        ("scale", lambda t: t.float(), "is F32, not BF16"),
        ("scale", lambda t: t * 0, "above 0"),
        ("scale", lambda t: t * (1 + 2**-7), "five significant bits"),
        ("weight", lambda t: t[:5].clone(), "is \\(5,\\), not \\(512,\\)"),
        ("weight", lambda t: t.to(torch.int8), "is I8, not U8"),
        ("mask", lambda t: t | 255, "keeps 2048 weights, of 1024"),
    ],
)
def test_four_bit_tensors_that_are_wrong(four, tmp_path, part, change, word):
    load(four).save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(file)
    tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PackedError, match=f"{name}.*{word}") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_only_safetensors_are_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(PackedError, match="only safetensors"):
        load(copy, use_safetensors=False)


def test_config_survives_its_own_round_trip():
    config = PackedConfig({"b": (8, 4, 9), "a": [4, 8, 0]}, 8)
    assert PackedConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == METHOD and list(config.linears) == ["a", "b"]


def test_killed_unpack_leaves_nothing_behind(folders, tmp_path):
    out, ready = tmp_path / "out", tmp_path / "ready"
    code = (
        "import sys, time, pathlib, transformers.modeling_utils as m\n"
        "from lib.commands.unpack import unpack_folder\n"
        "def hang(*_, **__):\n"
        "    pathlib.Path(sys.argv[3]).touch()\n"
        "    time.sleep(600)\n"
        "m.safe_save_file = hang\n"
        "unpack_folder(sys.argv[1], sys.argv[2])\n"
    )
    process = start(["-c", code, str(folders[1]), str(out), str(ready)], tmp_path)
    wait_until(lambda: ready.exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    assert ready.exists() and not out.exists()
    unpack_folder(str(folders[1]), str(out))
    assert torch.equal(logits(load(out)), logits(load(folders[0])))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "ready"]
