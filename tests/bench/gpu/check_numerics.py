"""Sums, factors and masks at the sizes of large models: errors against float64, rates, memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import medians, reset_peak, wait_for
from sizes import Size
from torch import Tensor

from lib.methods.admm import Admm, stiff_inverse
from lib.methods.gram import add_upper_gram_, mirror_
from lib.methods.sparsegpt import factorise
from lib.methods.sparsity import lowest_overall, lowest_per_row, n_of_m
from lib.methods.wanda import Wanda
from lib.util.host import gib

WIDEST = 28_672  # inputs of a 70B model's down projection
SUMS_OFF = 1e-4  # of the largest sum; tensor cores cut off where others round
WANDA_OFF = 1e-5  # of each sum, which is one of float64
FACTOR_OFF = 1e-4  # of what the matrix makes of a vector, at the largest width
INVERSE_OFF = 1e-3  # of a vector, there and back; the largest eigenvalue is half the width
PANEL = 2048  # rows that are turned into float64 at a time


def activations(tokens: int, width: int, device: torch.device, seed: int = 0) -> Tensor:
    """As they come: a few channels much larger than the rest, all of them related. bfloat16."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, device=device)
    x += torch.randn(tokens, 1, generator=generator, device=device)
    x[:, ::97] *= 30
    return x.bfloat16()


def check_products(device: str, size: Size) -> dict[str, Any]:
    """Every statistic on bfloat16 activations; the last widths are those of 7B."""
    there = torch.device(device)
    tokens = size.of(8192, 128)
    return {
        f"{width} wide": statistics(there, tokens, width)
        for width in size.of((4096, 11008), (64, 200))
    }


def statistics(device: torch.device, tokens: int, width: int) -> dict[str, Any]:
    """Errors as shares of the largest sum; TFLOP/s as if nothing were symmetric."""
    x, dense = activations(tokens, width, device), activations(tokens, width, device, 1)
    hessian = torch.zeros(width, width, device=device)
    add_upper_gram_(hessian, x)
    off = largest_off(hessian.triu(), x, x, upper=True)
    assert off < SUMS_OFF, f"X^T X at {width} is off by {off:.2g}"
    found: dict[str, Any] = {"X^T X off": off}
    wanda = Wanda(width, device)
    wanda.observe(x)
    exact = sum(part.double().square().sum(0) for part in x.split(PANEL))
    off = ((wanda.square_sum - exact).abs() / exact).max().item()
    assert off < WANDA_OFF, f"Wanda's sums at {width} are off by {off:.2g}"
    found["Wanda off"] = off
    admm = Admm(width, device)
    admm.observe(x, dense)
    off = largest_off(admm.drift, dense.double() - x.double(), x)
    assert off < SUMS_OFF, f"ADMM's drift at {width} is off by {off:.2g}"
    found["drift off"] = off
    calls = {
        "X^T X": lambda: add_upper_gram_(hessian, x),
        "Wanda": lambda: wanda.observe(x),
        "ADMM": lambda: admm.observe(x, dense),
    }
    spent = medians(calls, device, 5)
    found["TFLOP/s, X^T X"] = 2 * tokens * width**2 / spent["X^T X"] / 1e12
    found |= {f"ms, {name}": 1000 * value for name, value in spent.items()}
    return found


def largest_off(sums: Tensor, left: Tensor, right: Tensor, upper: bool = False) -> float:
    """Of `sums` (in, in) from left^T right in float64, as a share of the largest."""
    right, off, largest = right.double(), 0.0, 0.0
    for start in range(0, len(sums), PANEL):
        exact = left[:, start : start + PANEL].double().T @ right
        exact = exact.triu(start) if upper else exact
        off = max(off, (sums[start : start + PANEL] - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    return off / largest


def check_cholesky(device: str, size: Size) -> dict[str, Any]:
    """SparseGPT's factor and ADMM's inverse at the largest width, 3 GB each.

    Errors as what the factor makes of vectors, by products in float64.
    """
    there = torch.device(device)
    width = size.of(WIDEST, 96)
    reset_peak(there)
    hessian = torch.zeros(width, width, device=there)
    for seed in range(2):
        add_upper_gram_(hessian, activations(width // 2, width, there, seed))
    tries = torch.randn(width, 4, device=there, dtype=torch.float64)
    wait_for(there)
    start = time.perf_counter()
    factor, scale, dead = factorise(hessian, 0.01)
    wait_for(there)
    found = {"width": width, "s, factor": time.perf_counter() - start}
    assert not dead.any() and factor.isfinite().all()
    mirror_(hessian)
    damping = 0.01 * hessian.diagonal().mean().double()
    wanted = product(hessian, tries) + damping * tries
    inner = product(factor, tries, transposed=True) * scale.double().square()[:, None]
    found["factor off"] = off = relative(product(factor, inner), wanted)
    assert off < FACTOR_OFF, f"the factor at {width} is off by {off:.2g}"
    del factor
    scale = hessian.diagonal().sqrt()
    hessian.div_(scale).div_(scale[:, None])
    hessian.diagonal().add_(0.1)
    wait_for(there)
    start = time.perf_counter()
    inverse = stiff_inverse(hessian, 0.5)
    wait_for(there)
    found["s, inverse"] = time.perf_counter() - start
    back = product(inverse, product(hessian, tries) + 0.5 * tries)
    found["inverse off"] = off = relative(back, tries)
    assert off < INVERSE_OFF, f"the inverse at {width} is off by {off:.2g}"
    if there.type == "cuda":
        found["peak"] = gib(torch.cuda.max_memory_reserved(there))
        found["matrices at the peak"] = torch.cuda.max_memory_allocated(there) / hessian.nbytes
    return found


def product(matrix: Tensor, vectors: Tensor, transposed: bool = False) -> Tensor:
    """In float64, a panel of the matrix at a time."""
    panels = range(0, len(matrix), PANEL)
    cuts = [slice(start, start + PANEL) for start in panels]
    if transposed:
        return sum(matrix[cut].double().T @ vectors[cut] for cut in cuts)
    return torch.cat([matrix[cut].double() @ vectors for cut in cuts])


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def check_masks(device: str, size: Size) -> dict[str, Any]:
    """Masks of a 70B linear: how many, of the lowest, ties to the left, as on a CPU."""
    there = torch.device(device)
    rows, width = size.of((8192, WIDEST), (48, 96))
    generator = torch.Generator(there).manual_seed(0)
    score = torch.rand(rows, width, generator=generator, device=there)
    score = score.bfloat16().float()  # many ties
    half, some = score.numel() // 2, slice(0, size.of(64, 8))
    found: dict[str, Any] = {}
    calls = {
        "whole": lambda: lowest_overall(score, half),
        "by row": lambda: lowest_per_row(score, width // 2),
        "2:4": lambda: n_of_m(score, 2, 4),
    }
    for name, choose in calls.items():
        reset_peak(there)
        wait_for(there)
        start = time.perf_counter()
        mask = choose()
        wait_for(there)
        found[f"ms, {name}"] = 1000 * (time.perf_counter() - start)
        assert mask.sum() == half, f"{name}: {mask.sum()} instead of {half}"
        if name == "whole":
            assert score[mask].max() <= score[~mask].min(), f"{name}: not the lowest"
            ties = score == score[mask].max()
            order = mask.flatten()[ties.flatten()].int()
            assert (order.diff() <= 0).all(), f"{name}: ties are not taken from the left"
        else:
            on_cpu = score[some].cpu()
            own = n_of_m(on_cpu, 2, 4) if name == "2:4" else lowest_per_row(on_cpu, width // 2)
            assert torch.equal(mask[some].cpu(), own), f"{name}: another mask than a CPU's"
        if there.type == "cuda":
            found[f"peak, {name}"] = gib(torch.cuda.max_memory_allocated(there))
    return found
