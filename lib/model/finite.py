"""Checks that the weights of linears and their inputs are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.model.blocks import BlockRunner, Stop
from lib.model.linears import watch_inputs
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither nan nor inf; it is read once, without masks."""
    if not tensor.numel():
        return True
    # a nan becomes both extremes
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_finite(runner: BlockRunner) -> None:
    """Raise UserError naming the first linear of the blocks whose weight holds nan or inf."""
    for linear in runner.each_linear():
        check_weight(linear, runner.named)


def check_weight(linear: PrunableLinear, model: str) -> None:
    """Raise UserError if the weight holds nan or inf; the message begins with `model`."""
    weight = linear.raw_weight
    if weight.is_floating_point() and not all_finite(weight):
        raise UserError(
            f"{model}: the weight of {linear.name} holds nan or inf; download the model again"
        )


@torch.no_grad()
def first_overflow(runner: BlockRunner, windows: Tensor) -> str:
    """Return the name of the first linear that receives nan or inf from windows (n, tokens).

    This reads every activation, so it is for use after a loss that is not finite.
    """
    names = []

    def see(linear: PrunableLinear, x: Tensor) -> None:
        if not all_finite(x):
            names.append(linear.name)
            raise Stop

    states = runner.capture(windows, len(windows), runner.device)
    for index in range(len(runner.blocks)):
        with runner.on_device(index):
            linears = runner.linears(index)
            for linear in linears:  # of blocks that are fetched, nobody has looked at them
                check_weight(linear, runner.named)
            with watch_inputs(linears, see):
                try:
                    runner.advance_(states, index)
                except Stop:
                    return names[0]
    return "the output head"
