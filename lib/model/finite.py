"""Where numbers stop being finite: in a linear's weight, or in what flows into it."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.model.blocks import BlockRunner, Stop
from lib.model.linears import watch_inputs
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape holds neither nan nor inf; reads it once, makes no masks."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())  # nan among them wins


def check_finite(runner: BlockRunner) -> None:
    """UserError naming the first linear of the decoder blocks whose weight holds nan or inf."""
    for index in range(len(runner.blocks)):
        with runner.on_device(index):
            for linear in runner.linears(index):
                check_weight(linear, runner.named)


def check_weight(linear: PrunableLinear, model: str) -> None:
    """UserError naming the linear if its weight holds nan or inf; `model`: as `--model NAME`."""
    weight = linear.raw_weight
    if weight.is_floating_point() and not all_finite(weight):
        raise UserError(
            f"{model}: the weight of {linear.name} holds nan or inf; download the model again"
        )


@torch.no_grad()
def first_overflow(runner: BlockRunner, windows: Tensor) -> str:
    """Name of the first linear that receives nan or inf from windows (n, tokens).

    Run only after a loss was found not to be finite, since it looks at every activation.
    """
    names = []

    def see(linear: PrunableLinear, x: Tensor) -> None:
        if not all_finite(x):
            names.append(linear.name)
            raise Stop

    states = runner.capture(windows, len(windows), runner.device)
    for index in range(len(runner.blocks)):
        with runner.on_device(index), watch_inputs(runner.linears(index), see):
            try:
                runner.advance_(states, index)
            except Stop:
                return names[0]
    return "the output head"
