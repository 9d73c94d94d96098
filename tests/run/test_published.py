"""Whole runs against the published loops, with the windows, passes and rules written out.

Both loops prune block after block: all linears of a block see what the model computes with the
blocks before it pruned and this one dense. The forward passes are transformers' own; a hook on each
linear sees its input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from published import published_mask, published_sparsegpt, published_windows
from safetensors.torch import load_file
from support import QUICK, succeed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lib.methods.sparsity import Sparsity

SEQLEN, WINDOWS = 32, 8  # of QUICK
TYPES = ["unstructured", "2:4", "4:8"]


def wanda(weight: Tensor, x: Tensor, sparsity: Sparsity) -> Tensor:
    """The pruned weight (out, in); inputs `x` (tokens, in)."""
    return weight.masked_fill(published_mask(weight, x.double().norm(dim=0), sparsity), 0)


def sparsegpt(weight: Tensor, x: Tensor, sparsity: Sparsity) -> Tensor:
    pruned, _ = published_sparsegpt(weight, x.double().T @ x.double(), sparsity)
    return torch.from_numpy(pruned).float()


def note(inputs: dict[nn.Module, list[Tensor]], linear: nn.Module, args: tuple[Tensor]) -> None:
    inputs[linear].append(args[0].flatten(0, -2).float())


@torch.no_grad()
def published_loop(
    model: nn.Module, blocks: nn.ModuleList, windows: Tensor, solve: Callable
) -> None:
    """Prune every linear of every block in place."""
    for block in blocks:
        linears = [one for one in block.modules() if isinstance(one, nn.Linear | Conv1D)]
        inputs: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}
        hooks = [linear.register_forward_pre_hook(partial(note, inputs)) for linear in linears]
        for window in windows:
            model(window[None])
        for hook in hooks:
            hook.remove()
        for linear in linears:
            transposed = isinstance(linear, Conv1D)  # its weight is (in, out)
            weight = linear.weight.T if transposed else linear.weight
            pruned = solve(weight.clone(), torch.cat(inputs[linear]))
            linear.weight.copy_(pruned.T if transposed else pruned)


BLOCKS = {
    "Llama": lambda model: model.model.layers,
    "GPT-2": lambda model: model.transformer.h,
    "Gemma 2": lambda model: model.model.layers,
}


CASES = [("Llama", solve, kind) for solve in (wanda, sparsegpt) for kind in TYPES]
CASES += [("GPT-2", wanda, "4:8"), ("GPT-2", sparsegpt, "unstructured")]
CASES += [("Gemma 2", wanda, "unstructured"), ("Gemma 2", sparsegpt, "2:4")]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("architecture", "solve", "kind"), CASES)
def test_masks_and_weights_are_the_published_ones(
    architecture: str, solve: Callable, kind: str, tmp_path: Path
) -> None:
    wide = {"Llama": dict(intermediate_size=192)}  # more than one block of columns
    model = tiny.tiny_llama(**wide[architecture]) if architecture in wide else None
    folder = tiny.write_model(tmp_path / "model", model or tiny.ALL[architecture]())
    texts = tiny.write_texts(tmp_path / "uk", 20, 4)
    flags = ["--prune_method", solve.__name__, "--sparsity_type", kind, "--bos", "never", *QUICK]
    flags += ["--calibration_data", texts, "--save_model", tmp_path / "pruned"]
    succeed("--model", folder, *flags)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = (texts / "train.jsonl").read_text("utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [json.loads(row)["text"] for row in rows]
    windows, *_ = published_windows(documents, tokenizer, WINDOWS, SEQLEN, seed=0)
    sparsity = Sparsity.parse(kind, 0.5)
    published_loop(model, BLOCKS[architecture](model), windows, partial(solve, sparsity=sparsity))
    model.save_pretrained(tmp_path / "published")
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "published")
    )
    assert ours.keys() == theirs.keys()
    pruned = 0
    for name in theirs:
        assert torch.equal(ours[name] == 0, theirs[name] == 0), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
        pruned += (theirs[name] == 0).sum().item() if theirs[name].dim() == 2 else 0
    assert pruned > 5_000
