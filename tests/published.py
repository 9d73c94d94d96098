"""The published rules: how windows are drawn, and Wanda and SparseGPT, slowly, in float64."""

from __future__ import annotations

import random

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.methods.sparsity import Sparsity

Array = numpy.ndarray


def published_windows(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    again: bool = False,
) -> tuple[Tensor, list[int], list[int]]:
    """The loops for UberText and (`again`) C4: windows, and the rows and starts of each."""
    draw, used, windows, rows, starts = random.Random(seed), set(), [], [], []
    for _ in range(nsamples):
        while True:
            i = draw.randint(0, len(texts) - 1)
            if i in used:
                continue
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > seqlen:
                break
        if not again:
            used.add(i)
        rows.append(i)
        starts.append(draw.randint(0, ids.shape[1] - seqlen - 1))
        windows.append(ids[:, starts[-1] : starts[-1] + seqlen])
    return torch.cat(windows), rows, starts


def published_mask(weight: Tensor, norms: Tensor, sparsity: Sparsity) -> Tensor:
    """|W| * ||X|| compared within rows or within groups of m: one row, one group at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    score = (weight.double().abs() * norms.double()).tolist()
    for i, row in enumerate(score):
        step = sparsity.m or len(row)
        for start in range(0, len(row), step):
            part = row[start : start + step]
            count = sparsity.n if sparsity.m else int(len(row) * sparsity.ratio)
            for j in sorted(range(len(part)), key=part.__getitem__)[:count]:
                mask[i, start + j] = True
    return mask


def published_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: Sparsity,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Array, Array]:
    """Weight and mask by algorithm 1 of arXiv 2301.00774, with the exact number of zeros."""
    w = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    width = len(h)
    dead = numpy.diag(h) == 0
    mean = numpy.diag(h).mean()
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * mean * numpy.eye(width)
    upper = numpy.linalg.cholesky(numpy.linalg.inv(h)).T
    mask = numpy.zeros(w.shape, bool)
    for column in range(width):
        if sparsity.m is None and column % block_size == 0:
            choose = slice(column, min(column + block_size, width))
            score = (w[:, choose] / numpy.diag(upper)[choose]) ** 2
            count = int(score.size * sparsity.ratio)
            order = numpy.argsort(score.T, axis=None, kind="stable")[:count]
            chosen = numpy.zeros(score.size, bool)
            chosen[order] = True
            mask[:, choose] = chosen.reshape(score.T.shape).T
        if sparsity.m and column % sparsity.m == 0:
            choose = slice(column, column + sparsity.m)
            score = (w[:, choose] / numpy.diag(upper)[choose]) ** 2
            order = numpy.argsort(score, axis=1, kind="stable")[:, : sparsity.n]
            numpy.put_along_axis(mask[:, choose], order, True, axis=1)
        error = numpy.where(mask[:, column], w[:, column], 0) / upper[column, column]
        w[:, column:] -= numpy.outer(error, upper[column, column:])
        w[mask[:, column], column] = 0
    return w, mask
