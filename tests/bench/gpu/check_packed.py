"""The packed form: products at 1 to 4,096 tokens beside dense ones, and a model with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import made
import torch
from measure import medians
from sizes import Size
from torch import nn

import lib.sparse
from lib.methods.sparsity import n_of_m
from lib.model.pretrained import decoder_blocks
from lib.packed.errors import PackedWarning
from lib.packed.linear import SparseLinear
from lib.util.host import gib

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
PRODUCT_OFF = 0.01  # of bfloat16 products, as a share of the norm
REPEATS = 20  # of products in a row, where each takes microseconds


def check_products(device: str, size: Size) -> dict[str, Any]:
    """See `products`; with what was warned of, such as a kernel that could not be used."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = products(device, size)
    lines = {str(one.message) for one in warned if issubclass(one.category, PackedWarning)}
    return found | ({"warned": "; ".join(sorted(lines))} if lines else {})


@torch.no_grad()
def products(device: str, size: Size) -> dict[str, Any]:
    """A 7B linear in bfloat16: microseconds, dense, on torch's 2:4 kernels, and without these."""
    there = torch.device(device)
    inner, hidden = size.of((11008, 4096), (128, 64))
    found: dict[str, Any] = {}
    for rows, width in ((inner, hidden), (hidden, inner)):
        torch.manual_seed(0)
        dense = nn.Linear(width, rows, bias=False, device=there, dtype=torch.bfloat16)
        dense.weight[n_of_m(dense.weight.abs(), 2, 4)] = 0
        dense.requires_grad_(False)
        fast, other = SparseLinear.from_linear(dense), SparseLinear.from_linear(dense)
        other.reason = "left out, to measure what is done without them"
        used = fast.use_semi_structured_()
        found[f"{rows} x {width}"] = fast.reason if used else f"no 2:4 kernels: {fast.reason}"
        layers = {"dense": dense, "packed": other} | ({"2:4": fast} if used else {})
        for tokens in TOKENS[: size.of(len(TOKENS), 3)]:
            x = torch.randn(tokens, width, device=there, dtype=torch.bfloat16)
            exact = x.double() @ dense.weight.double().T
            row: dict[str, Any] = {}
            for name, layer in layers.items():
                off = ((layer(x).double() - exact).norm() / exact.norm()).item()
                assert off < PRODUCT_OFF, f"{name} at {tokens} tokens is off by {off:.2g}"
                row[f"{name} off"] = off
            calls = {name: lambda one=one, x=x: one(x) for name, one in layers.items()}
            spent = medians(calls, there, 5, size.of(REPEATS, 1))
            row |= {f"us, {name}": 1e6 * value for name, value in spent.items()}
            found[f"{rows} x {width}, {tokens} tokens"] = row
    return found


def check_layers(device: str, size: Size) -> dict[str, Any]:
    """2:4 with packed layers: the outputs are compared, the model saved, loaded and measured."""
    flags = made.flags_of("large", size, device, Path(size.model) if size.model else None)
    asked = ["--prune_method", "wanda", "--sparsity_type", "2:4", "--replace_sparse_layers"]
    with made.scratch(size) as folder:
        target = folder / "model"
        said, results = made.ran(*flags, *asked, "--save_model", str(target))
        stored = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        _, again = made.ran(*flags, "--eval_only", "--model", str(target))
        report = loaded(target, torch.device(device))
    value, other = made.perplexity(results), made.perplexity(again)
    assert abs(other - value) < 1e-3 * value, f"{value}, and {other} loaded again"
    return {
        "saved": made.told(said, r"\S+ linears.*?: "),
        "loaded": made.told(report, r"\S+ linears.*?: "),
        "footprint": made.told(said, "footprint: "),
        "in its files": gib(stored),
        "perplexity": value,
        "loaded again": other,
        "s, eval": results["seconds"]["eval"],
    }


def loaded(folder: Path, device: torch.device) -> str:
    """How the linears of a packed model run that transformers has loaded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    return str(lib.sparse.swap_linears_(model, decoder_blocks(model)[1]))
