"""Proves that llama.cpp predicts after beginnings of one window as the model does.

The log-probabilities of the likeliest tokens must agree within the rounding of the file's type.
That rounding is measured. For a type that the converter writes, the model is run once more with
rounded weights, and with the inputs of its linears rounded as in llama.cpp. For a type that
llama-quantize writes, llama.cpp runs the weights that the file holds, in 16 bits (see weights.py).
llama.cpp must agree with that run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lib.gguf.llama_cpp import ask
from lib.gguf.types import FLOATS, rounded
from lib.util.errors import UserError

PLACES = 8  # beginnings of the window
TOP = 256  # likeliest tokens compared after each beginning
FLOOR = 0.02  # distance always allowed: llama.cpp has 16-bit keys and values
TIMES = 1.5  # of the rounding: some values round the other way
CEILING = 0.3  # wrong weights differ by more


@dataclass(frozen=True)
class Logits:
    """Relative distances of log-probabilities after `places` beginnings.

    `distance` is that of llama.cpp from the model, `rounding` that of the rounded run from the
    model, `unexplained` that of llama.cpp from the rounded run.
    """

    distance: float
    rounding: float
    unexplained: float
    places: int

    @property
    def limit(self) -> float:
        return max(FLOOR, min(TIMES * self.rounding, CEILING))

    def line(self) -> str:
        return (
            f"logits after {self.places} beginnings differ by {self.distance:.2g} "
            f"(rounding explains {self.rounding:.2g}, unexplained {self.unexplained:.2g})"
        )


class Reference:
    """What the model of the folder `weights` predicts, in float32, to compare files with.

    It predicts after beginnings of `window` (1, tokens). `letter` is the id of a token of letters.
    """

    def __init__(self, weights: Path, window: Tensor, letter: int) -> None:
        self.weights, self.window, self.letter = weights, window, letter
        length = window.shape[1]
        self.ends = sorted({max(1, length * place // PLACES) for place in range(1, PLACES + 1)})
        self.model = AutoModelForCausalLM.from_pretrained(
            weights, dtype=torch.float32, local_files_only=True
        ).eval()
        self.dense = self._of_model()

    def prove(self, file: Path, weight_type: str) -> Logits:
        """Compare a file that the converter wrote; this rounds the model, so it is done once.

        Raises UserError if llama.cpp differs from the rounded model by more than rounding.
        """
        with torch.no_grad():
            _round_(self.model, weight_type)
        return self._compared(file, self._of_model(), weight_type)

    def prove_rounded(self, file: Path, dequantised: Path, weight_type: str) -> Logits:
        """Compare a file with another that holds the same weights in 16 bits.

        Raises UserError if llama.cpp runs both differently.
        """
        return self._compared(file, self._of_file(dequantised), weight_type)

    def _compared(self, file: Path, rounded_: Tensor, weight_type: str) -> Logits:
        llama = self._of_file(file)
        compared = ~(llama.isnan() | rounded_.isnan())
        logits = Logits(
            distance=_distance(self.dense, llama, compared),
            rounding=_distance(self.dense, rounded_, compared),
            unexplained=_distance(rounded_, llama, compared),
            places=len(self.ends),
        )
        if not logits.unexplained <= logits.limit:
            raise UserError(f"{logits.line()}, which is more than {weight_type} can explain")
        return logits

    @torch.no_grad()
    def _of_model(self) -> Tensor:
        """Return the model's log-probabilities (ends, rows)."""
        logits = self.model(self.window).logits[0, [end - 1 for end in self.ends]]
        return logits.double().log_softmax(-1)

    def _of_file(self, file: Path) -> Tensor:
        """Return llama.cpp's log-probabilities (ends, rows), NaN for all but the likeliest."""
        prompts = [self.window[0, :end].tolist() for end in self.ends]
        rows = self.dense.shape[-1]
        request = {"prompts": prompts, "top": min(TOP, rows), "letter": self.letter}
        answer = ask(file, request | {"context": self.window.shape[1] + 32})
        llama = torch.full_like(self.dense, torch.nan)
        for row, pairs in enumerate(answer["logits"]):
            for number, value in pairs:
                if number < rows:
                    llama[row, number] = value
        return llama


def _round_(model: nn.Module, weight_type: str) -> None:
    """Round all matrices along the dimension that products sum over, and the inputs of linears.

    Embedding and head have 8 bits at least.
    """
    outer = weight_type if weight_type in FLOATS else "q8_0"
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}

    def round_input(_: nn.Module, inputs: tuple) -> tuple:
        return rounded(inputs[0], outer), *inputs[1:]

    seen: set[int] = set()
    for module in model.modules():
        across = type(module).__name__ == "Conv1D"  # GPT-2's linears hold (in, out)
        if across or isinstance(module, nn.Linear):
            module.register_forward_pre_hook(round_input)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                weight = parameter.mT if across else parameter
                kind = outer if id(module) in ends else weight_type
                weight.copy_(rounded(weight.contiguous(), kind))


def _distance(reference: Tensor, other: Tensor, compared: Tensor) -> float:
    """Return the distance of log-probabilities (places, rows), relative to their spread.

    Only entries where `compared` is True count; where there are none at some place, it is NaN.
    """
    if not compared.any(-1).all():
        return math.nan
    difference = torch.where(compared, other - reference, 0.0)
    count = compared.sum(-1, keepdim=True)
    mean = torch.where(compared, reference, 0.0).sum(-1, keepdim=True) / count
    spread = torch.where(compared, reference - mean, 0.0)
    return float(difference.norm() / spread.norm())
