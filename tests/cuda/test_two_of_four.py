"""2:4 layers of packed models by torch's semi-structured tensors, on the pretended device.

torch's own classes, with their checks, hold what the device's operators decode: what is shown is
how they are made, refused, moved, saved and loaded. No test here knows a GPU's numerics or speed.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from support import PACKED, loaded, results, succeed, weights, windows
from torch import nn
from transformers import AutoTokenizer

import lib.packed.checkpoint  # noqa: F401  transformers then loads the packed form
from lib.methods.sparsity import Sparsity
from lib.model.saving import footprint
from lib.packed.linear import SparseLinear, semi_structured_bytes

HERE = torch.device("cuda:0")
BASE = ["--seqlen", "32", "--nsamples", "6", "--completions", "0", "--batch_size", "4"]
BASE += ["--calibration_data", "uk", "--eval_data", "uk", "--device", "cuda:0"]
WANDA = ["--prune_method", "wanda", "--sparsity_type"]
PACK = {16: ["--replace_sparse_layers"], 4: ["--replace_sparse_layers", "--quantize", "int4"]}
ODD = 72  # rows that no kernel takes
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama().bfloat16())
    tiny.write_model(folder / "odd", tiny.tiny_llama(intermediate_size=ODD).bfloat16())
    tiny.write_texts(folder / "uk", train=60, test=3)
    return folder


def run(folder: Path, *argv: object, model: Path | str = "model") -> dict[str, Any]:
    """Results of a run that succeeds, with its line on packed layers; its model is beside them."""
    out = ["--save", folder / "out"]
    out += [] if "--eval_only" in argv else ["--save_model", folder / "model"]
    done = succeed("--model", model, *BASE, *argv, *out)
    line = re.search("^packed linear layers[^:]*: (.*)$", done.out, re.MULTILINE)
    return results(folder / "out") | {"line": line and line[1]}


def layer(rows: int = 64, columns: int = 128, dtype=torch.bfloat16, kind: str = "2:4") -> nn.Linear:
    linear = nn.Linear(columns, rows, dtype=dtype, device=HERE).requires_grad_(False)
    linear.weight[Sparsity.parse(kind, 0.5).mask(torch.rand(rows, columns)).cuda()] = 0
    return linear


def inputs(columns: int = 128, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, 5, columns, dtype=dtype, device=HERE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("backend", ["CUSPARSELT", "CUTLASS"])
@pytest.mark.parametrize("bits", [16, 4])
def test_made_moved_copied_and_saved(
    bits: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "CUTLASS":
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    packed = SparseLinear.from_linear(layer(), PACKED[bits])
    dense, size, x = packed.to_dense(), footprint(packed), inputs()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    for act in (
        lambda: copy.deepcopy(packed),
        lambda: packed.cpu(),
        lambda: packed.to("cuda:1"),
        lambda: packed.to(HERE),
    ):
        torch.testing.assert_close(packed.to(HERE)(x), dense(x))
        assert type(packed.semi_structured).__name__ == f"SparseSemiStructuredTensor{backend}"
        assert semi_structured_bytes(packed) == 64 * 128 * 9 // 8  # two bytes for two of four, bits
        assert footprint(packed) == 64 * 128 * 9 // 8 + (size if bits == 4 else 2 * 64)
        moved = act()
        assert packed.semi_structured is None and footprint(packed) == size
        assert same({name: tensor.to(HERE) for name, tensor in moved.state_dict().items()}, before)
    half = copy.deepcopy(packed).half()
    y = half(inputs(dtype=torch.float16))
    assert y.dtype == half.semi_structured.dtype == half.dense().dtype == torch.float16


@pytest.mark.parametrize(
    "sizes, backend, reason",
    [
        (dict(rows=ODD), "CUSPARSELT", r"^torch: .*shape.*multiple of \(16, 16\)$"),
        (dict(columns=48), "CUTLASS", r"^torch: .*shape.*multiple of \(32, 64\)$"),
        (
            dict(dtype=torch.float32),
            "CUSPARSELT",
            "^torch: .*torch.float32 is not a supported",
        ),
        (
            dict(dtype=torch.float32),
            "CUTLASS",
            "^torch: .*torch.float32 is not a supported",
        ),
        (dict(), "CUTLASS", "^torch: .*compute capability 8.x$"),  # the device is of 9.0
        (dict(kind="4:8"), "CUSPARSELT", "^not 2:4$"),
        (dict(kind="unstructured"), "CUSPARSELT", "^not 2:4$"),
    ],
)
def test_refused(
    sizes: dict[str, Any], backend: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "CUTLASS":
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    for bits in (16, 4):
        packed = SparseLinear.from_linear(linear := layer(**sizes), PACKED[bits])
        x = inputs(linear.in_features, linear.weight.dtype)
        assert torch.equal(packed(x), packed.to_dense()(x))
        assert packed.semi_structured is None and re.search(reason, packed.refused)


def test_compiled_once_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "mem_get_info", "current_device", "set_device", "memory_allocated"):
        same_one = getattr(torch.cuda, name)  # torch._dynamo expects functions of its own
        monkeypatch.setattr(torch.cuda, name, lambda *a, it=same_one, **k: it(*a, **k))
    packed, x = SparseLinear.from_linear(layer()), inputs()
    y = packed(x)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y) and packed.semi_structured is not None


@pytest.mark.parametrize("bits, dtype", [(16, "bfloat16"), (4, "bfloat16"), (16, "float16")])
def test_a_whole_run_and_its_checkpoint(bits: int, dtype: str, tmp_path: Path) -> None:
    there = ["--dtype", dtype]
    found = run(tmp_path, *WANDA, "2:4", *PACK[bits], *there)
    assert found["line"] == "14 by torch's 2:4 kernels"
    perplexity = found["perplexity"]["uk"]

    dense = loaded(tmp_path / "model").dequantize()  # the masked model, rounded with int4
    dense.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained("model").save_pretrained(tmp_path / "dense")
    masked = run(tmp_path / "masked", "--eval_only", *there, model=tmp_path / "dense")
    assert masked["perplexity"]["uk"] == pytest.approx(perplexity, rel=1e-3)
    if bits == 16:
        plain = run(tmp_path / "plain", *WANDA, "2:4", *there)
        assert same(weights(tmp_path / "dense"), weights(tmp_path / "plain/model"))
        assert plain["perplexity"]["uk"] == pytest.approx(perplexity, rel=1e-3)

    again = run(tmp_path / "again", "--eval_only", *there, model=tmp_path / "model")
    assert again["perplexity"] == found["perplexity"]
    model, ids = loaded(tmp_path / "model", device_map="cuda:0"), windows(2)
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), dense(ids).logits, rtol=0.1, atol=1)
    said = model.generate(ids[:1].cuda(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert said.shape == (1, ids.shape[1] + 4)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 14 and all(one.semi_structured is not None for one in layers)
    assert footprint(model) > semi_structured_bytes(model) > 0
    model.save_pretrained(tmp_path / "saved")
    assert same(weights(tmp_path / "saved"), weights(tmp_path / "model"))


@pytest.mark.parametrize("bits", [16, 4])
def test_fetched_blocks_multiply_by_them_too(bits: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *WANDA, "2:4", *PACK[bits])
    argv = [*WANDA, "2:4", *PACK[bits], "--offload_folder", tmp_path / "blocks"]
    fetched = run(tmp_path / "fetched", *argv)
    assert fetched["line"] == whole["line"] == "14 by torch's 2:4 kernels"
    assert fetched["perplexity"] == whole["perplexity"]
    assert same(weights(tmp_path / "fetched/model"), weights(tmp_path / "whole/model"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_what_accelerate_offloads_is_unpacked(where: str, tmp_path: Path) -> None:
    run(tmp_path, *WANDA, "2:4", *PACK[16])
    places = dict.fromkeys(["embed_tokens", "norm", "rotary_emb", "layers.0"], 0)
    places = {f"model.{name}": at for name, at in (places | {"layers.1": where}).items()}
    model = loaded(
        tmp_path / "model", device_map=places | {"lm_head": 0}, offload_folder=tmp_path / "away"
    )
    whole, ids = loaded(tmp_path / "model", device_map="cuda:0"), windows(2).cuda()
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0.1, atol=1)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert [one.refused for one in layers] == [""] * 7 + ["offloaded"] * 7
    model.save_pretrained(tmp_path / "saved")
    assert same(weights(tmp_path / "saved"), weights(tmp_path / "model"))


def test_layers_that_torch_refuses_are_unpacked(tmp_path: Path) -> None:
    found = run(tmp_path / "odd", *WANDA, "2:4", *PACK[16], model="odd")
    assert found["line"].startswith("8 by torch's 2:4 kernels, 4 unpacked at each forward (torch: ")
    assert found["line"].count("is not supported!") == 2  # both shapes
    found = run(tmp_path / "4:8", *WANDA, "4:8", *PACK[16])
    assert found["line"] == "14 unpacked at each forward (not 2:4)"
    for folder in ("odd", "4:8"):
        again = run(tmp_path / "again", "--eval_only", model=tmp_path / folder / "model")
        assert again["perplexity"] == results(tmp_path / folder / "out")["perplexity"]
