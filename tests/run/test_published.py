"""Whole runs against the published loops, written out here with nothing of this package.

Both loops prune block after block: all linears of a block see what the model computes with the
blocks before it pruned and this one dense. The forward passes are transformers' own; a hook on each
linear sees its input. Wanda: Sun et al. 2023, algorithm 1. SparseGPT: Frantar and Alistarh 2023,
algorithm 1, as their code has it (blocks of 128 columns, one percent of damping).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import QUICK, call
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

SEQLEN, WINDOWS = 32, 8  # of QUICK
TYPES = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}
Pattern = tuple[int, int] | None


def published_windows(model: Path, texts: Path, seed: int = 0) -> Tensor:
    """(windows, tokens): documents longer than a window, each used once, by Python's random."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(row)["text"] for row in (texts / "train.jsonl").open(encoding="utf-8")]
    draw, used, windows = random.Random(seed), set(), []
    while len(windows) < WINDOWS:
        index = draw.randint(0, len(rows) - 1)
        if index in used:
            continue
        ids = tokenizer(rows[index], return_tensors="pt").input_ids
        if ids.shape[1] <= SEQLEN:
            continue
        used.add(index)
        start = draw.randint(0, ids.shape[1] - SEQLEN - 1)
        windows.append(ids[:, start : start + SEQLEN])
    return torch.cat(windows)


def wanda(weight: Tensor, inputs: list[Tensor], pattern: Pattern) -> Tensor:
    """The pruned weight (out, in); `inputs`: (tokens, in) of each window."""
    scaler_row, seen = torch.zeros(weight.shape[1]), 0
    for x in inputs:
        scaler_row = scaler_row * seen / (seen + 1) + x.norm(dim=0) ** 2 / (seen + 1)
        seen += 1
    metric = weight.abs() * scaler_row.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if pattern:
        n, m = pattern
        for column in range(0, weight.shape[1], m):
            lowest = torch.topk(metric[:, column : column + m], n, dim=1, largest=False).indices
            mask.scatter_(1, column + lowest, True)
    else:
        lowest = metric.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
        mask.scatter_(1, lowest, True)
    return weight.masked_fill(mask, 0)


def sparsegpt(weight: Tensor, inputs: list[Tensor], pattern: Pattern) -> Tensor:
    """The pruned and repaired weight (out, in)."""
    w, columns = weight.clone(), weight.shape[1]
    hessian, seen = torch.zeros(columns, columns), 0
    for x in inputs:
        hessian *= seen / (seen + 1)
        seen += 1
        x = (2 / seen) ** 0.5 * x
        hessian += x.T @ x
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    index = torch.arange(columns)
    hessian[index, index] += 0.01 * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for begin in range(0, columns, 128):
        end = min(begin + 128, columns)
        block, errors = w[:, begin:end].clone(), torch.zeros(len(w), end - begin)
        factor = upper[begin:end, begin:end]
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not pattern:
            score = block**2 / factor.diagonal() ** 2
            mask = score <= score.flatten().sort().values[score.numel() // 2 - 1]
        for i in range(end - begin):
            if pattern and i % pattern[1] == 0:
                n, m = pattern
                score = block[:, i : i + m] ** 2 / factor.diagonal()[i : i + m] ** 2
                mask.scatter_(1, i + torch.topk(score, n, dim=1, largest=False).indices, True)
            kept = block[:, i].masked_fill(mask[:, i], 0)
            errors[:, i] = (block[:, i] - kept) / factor[i, i]
            block[:, i:] -= errors[:, i : i + 1] * factor[i : i + 1, i:]
            block[:, i] = kept
        w[:, begin:end] = block
        w[:, end:] -= errors @ upper[begin:end, end:]
    return w


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
            pruned = solve(weight.clone(), inputs[linear])
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
    done = call("--model", folder, *flags)
    assert done.status == 0, done.err

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = published_windows(folder, texts)
    published_loop(model, BLOCKS[architecture](model), windows, partial(solve, pattern=TYPES[kind]))
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
