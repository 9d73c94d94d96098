"""Proves that llama.cpp predicts the next token as the model does.

After beginnings of several windows the log-probabilities of the likeliest tokens must be the
model's. The file in 32 bits is compared strictly: it shows whether llama.cpp computes this model as
transformers does. A file of another type has the same fields and the same weights, rounded
(tensors.py); it is compared loosely, which shows that llama.cpp's code for the type works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib.commands.gguf.llama_cpp import ask
from lib.util.errors import UserError

PLACES = 8  # beginnings of each window
TOP = 256  # likeliest tokens compared after each beginning
# largest distances from the model; one matrix 10% too large makes 0.08, other weights make 1.4
LIMITS = {"f32": 0.01, "f16": 0.05, "bf16": 0.2, "q8_0": 0.5, "q4_0": 1.2}


def prove_predictions(
    weights: Path, files: Mapping[str, Path], windows: Mapping[str, Sequence[Tensor]], letter: int
) -> dict[str, Any]:
    """Compare what each file predicts (type: file) with the model in the folder `weights`.

    `windows` (name: each (tokens,)) are what it reads, `letter` is the id of a token of letters.
    Returns the tokens of each window, the number of `places` and the `distances` by type. Raises
    UserError if llama.cpp differs by more than the type's limit.
    """
    prompts, expected = [], []
    model = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    for window in (window for its in windows.values() for window in its):
        length = len(window)
        ends = sorted({max(1, length * place // PLACES) for place in range(1, PLACES + 1)})
        prompts += [window[:end].tolist() for end in ends]
        with torch.no_grad():
            last = torch.tensor(ends) - 1
            logits = model(window[None], use_cache=False, logits_to_keep=last).logits[0]
        expected.append(logits.double().log_softmax(-1))
    del model
    dense = torch.cat(expected)  # (places, rows)
    distances = {}
    for weight_type, file in files.items():
        distances[weight_type] = distance = _distance(dense, file, prompts, letter)
        if not distance <= LIMITS[weight_type]:
            raise UserError(
                f"in {weight_type} predictions differ by {distance:.2g}, more than "
                f"{LIMITS[weight_type]}: llama.cpp computes this model otherwise"
            )
    lengths = {name: [len(window) for window in its] for name, its in windows.items()}
    return {"windows": lengths, "places": len(prompts), "distances": distances}


def _distance(dense: Tensor, file: Path, prompts: list[list[int]], letter: int) -> float:
    """Return the distance of log-probabilities relative to their spread, over all places.

    `dense` (places, rows) is compared where llama.cpp names its likeliest tokens.
    """
    rows = dense.shape[-1]
    request = {"prompts": prompts, "top": min(TOP, rows), "letter": letter}
    answer = ask(file, request | {"context": max(map(len, prompts)) + 32})
    distances = []
    for own, pairs in zip(dense, answer["logprobs"], strict=True):
        ids, values = zip(*(pair for pair in pairs if pair[0] < rows), strict=True)
        theirs, ours = torch.tensor(values, dtype=torch.float64), own[list(ids)]
        distances.append((theirs - ours).norm() / (ours - ours.mean()).norm())
    return float(torch.stack(distances).square().mean().sqrt())
