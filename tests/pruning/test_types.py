"""A type of llama.cpp is one class and one line: every command then knows it."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import FORMATS, GRIDS, Quantizer, check_quantized, runner_of, windows
from torch import Tensor

from lib.calibration.fisher import FisherDiagonal
from lib.calibration.mixed_types import choose, rounding_costs, sizes_of
from lib.formats import registry
from lib.formats.grids import LlamaCppType, Types, held_type
from lib.gguf import limit_of, types
from lib.run.flags import build_parser

NAME = "q6_new"


class Six(LlamaCppType):
    """Six bits, with the power of two that holds a block's largest value."""

    name = NAME
    bits = 6
    lowest, highest = -32, 31
    offered = ("layers",)
    limit = 0.25
    file_type = "Q6_N"

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        steps = self._blocks(tile)[1].abs().div_(31).clamp_min_(2.0**-20).squeeze(2)
        return 2 ** steps.log2().ceil()


def asked_for() -> str:
    return build_parser().parse_args(["--model", "m", "--quantize", NAME]).quantize


def test_a_type_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(SystemExit):
        asked_for()
    assert f"{NAME}: must be {', '.join(GRIDS)}, int4, auto or FILE.json" in capsys.readouterr().err
    assert NAME not in types()

    monkeypatch.setitem(registry.LLAMA_CPP, NAME, f"{__name__}:Six")
    form = FORMATS[NAME]
    assert asked_for() == NAME  # main.py
    assert NAME in types() and limit_of(NAME) == 0.25  # gguf --type, and its proof
    assert registry.TYPES[NAME].file_type == "Q6_N"
    assert Types({"layer": NAME}).bits_of("layer", 64) == form.bits_per_weight == 6.5

    model = tiny.ALL["Llama"]().requires_grad_(False)
    sizes = sizes_of(model, "model.layers", 8)  # --quantize auto
    offered = {name: NAME in each for name, each in sizes.items()}
    assert sum(offered.values()) and not offered["model.embed_tokens.weight"]
    name = next(name for name in sizes if offered[name])
    matrix = model.get_parameter(name)
    outputs, inputs = (torch.ones(size, dtype=torch.float64) for size in matrix.shape)
    sums = FisherDiagonal(inputs, outputs, torch.tensor(1.0), inputs)
    costs = rounding_costs(matrix, sums, sizes[name])
    assert costs["q8_0"] < costs[NAME] < costs["iq4_nl"]
    two = {name: {kind: sizes[name][kind] for kind in ("iq4_nl", NAME)}}
    assert choose({name: costs}, two, sizes[name][NAME]) == {name: NAME}

    runner = runner_of(model)
    Quantizer(runner, form).run(windows(5))
    assert check_quantized(runner, form)["format"] == NAME
    assert held_type(runner.model.get_parameter(name)) == NAME
