"""Pieces of the sweep that know how blocks are called: their forward replaced, arguments taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


@contextmanager
def replaced(blocks: nn.ModuleList, make: Callable[[int], Callable]) -> Iterator[None]:
    """Inside, block i's forward is `make(i)`; afterwards it is its own again."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """A block's hidden states, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def interned(value, known: dict[tuple, list[Tensor]]):
    """`value` with equal tensors replaced by one: most arguments are the same in all batches."""
    if isinstance(value, dict):
        return {key: interned(item, known) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(interned(item, known) for item in value)
    if not isinstance(value, Tensor):
        return value
    alike = known.setdefault((value.shape, value.dtype, value.device), [])
    for other in alike:
        if value is other or torch.equal(value, other):
            return other
    alike.append(value)
    return value
