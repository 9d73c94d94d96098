"""Where numbers stop being finite: in a linear's weight, or in what flows into it."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.model.blocks import BlockRunner, Stop
from lib.model.linears import find_linears, watch_inputs
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape holds neither nan nor inf; reads it once, makes no masks."""
    if not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())  # nan is handed on


def check_finite(runner: BlockRunner) -> None:
    """UserError naming the first linear of the decoder blocks whose weight holds nan or inf."""
    for index, block in enumerate(runner.blocks):
        with runner.on_device(index):
            for linear in find_linears(block, f"{blocks_name(runner)}.{index}")[0]:
                check_weight(linear, runner.model.name_or_path)


def check_weight(linear: PrunableLinear, model: str) -> None:
    """UserError naming the linear if its weight holds nan or inf."""
    weight = linear.stored
    if weight.is_floating_point() and not all_finite(weight):
        raise UserError(
            f"--model {model}: the weight of {linear.name} holds nan or inf; "
            "download the model again"
        )


def blocks_name(runner: BlockRunner) -> str:
    """Full name of the list of decoder blocks, as `model.layers`."""
    return next(name for name, module in runner.model.named_modules() if module is runner.blocks)


@torch.no_grad()
def first_overflow(runner: BlockRunner, windows: Tensor) -> str:
    """Name of the first linear that receives nan or inf from windows (n, tokens).

    Run only after a loss was found not to be finite, since it looks at every activation.
    """
    found = []

    def see(linear, x: Tensor) -> None:
        if not all_finite(x):
            found.append(linear.name)
            raise Stop

    states = runner.capture(windows, len(windows), runner.device)
    for index, block in enumerate(runner.blocks):
        linears, _ = find_linears(block, f"{blocks_name(runner)}.{index}")
        with runner.on_device(index), watch_inputs(linears, see):
            try:
                runner.advance_(states, index)
            except Stop:
                return found[0]
    return "the output head"
