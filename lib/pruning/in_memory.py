"""Models, texts and results in memory, for `prune` of lib/prune.py."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.windows import tokenize
from ..methods.sparsity import Sparsity
from ..model.blocks import BlockRunner
from ..model.pretrained import default_batch_size
from ..util.errors import UserError
from .inputs import check_widths
from .masks import Packed, unpacked


@dataclass(frozen=True)
class Pruned:
    """The results of pruning, by layer: the full name of a linear layer of the blocks."""

    errors: dict[str, float]  # relative squared error of its outputs, see lib/pruning/errors.py
    shares: dict[str, float]  # share of zeros
    sparsity: float  # share of zeros in all layers together
    notes: list[str]  # fallbacks and layers left dense
    packed: Packed

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool (out, in), True where a weight is pruned; unpacked at each call."""
        return unpacked(self.packed)


def text_windows(
    tokenizer: Any, texts: Sequence[str], seqlen: int, count: int, seed: int
) -> Tensor:
    """Return `count` windows of token ids (count, seqlen) from the texts, shuffled with `seed`.

    Raises UserError if they are too short.
    """
    if tokenizer is None:
        raise UserError("tokenizer: texts require one. Give it, or windows of token ids.")
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    pieces, total = [], 0
    for place in order:
        if total < count * seqlen:
            pieces.append(tokenize(tokenizer, texts[place]))
            total += len(pieces[-1])
    if total < count * seqlen:
        raise UserError(
            f"texts: their {total} tokens are too few for nsamples {count} windows of seqlen "
            f"{seqlen}. Give more text, or lower one of these."
        )
    return torch.cat(pieces)[: count * seqlen].view(count, seqlen)


@contextmanager
def runner_of(
    model: PreTrainedModel, seqlen: int, batch_size: int | None, sparsity: Sparsity
) -> Iterator[BlockRunner]:
    """Yield a runner of the model's blocks in place; afterwards the model's modes are restored.

    Raises UserError if they cannot run one by one, are not finite, or too narrow for the pattern.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training, device = model.training, next(model.parameters()).device
    width = model.config.get_text_config(decoder=True).hidden_size
    batch_size = batch_size or default_batch_size(device, seqlen, width)
    try:
        model.eval().requires_grad_(False)
        runner = BlockRunner(model, device, flag="model", batch_size=batch_size)
        check_widths(runner.blocks, runner.name, sparsity)
        runner.verify()
        runner.check_finite()
        yield runner
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_()
