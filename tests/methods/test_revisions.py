"""What each method gives on a tiny model: where it changes, the class's `revision` rises.

Runs are resumed, and skipped by a sweep, only under the same revision. Masks are compared by
digest, and the kept weights by their norm: processors round differently.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import tiny
from support import layout_of, prune_, runner_of, windows
from torch import nn

from lib.formats.registry import FORMATS
from lib.methods.gptq import GPTQ
from lib.methods.registry import EXPERT_METHODS, METHODS, method_of
from lib.methods.sparsity import EXPERTS, NEURONS, Sparsity
from lib.stages.quantize import quantize
from lib.stages.remove import remove

# (revision, digest of the masks, norm of the weights) of each case
GIVEN = {
    "wanda 50%": (1, "003d32c012c7", 28.125951),
    "wanda 2:4": (1, "8736bcab0c2c", 27.371586),
    "sparsegpt 50%": (1, "4fcccb622b79", 28.46828),
    "sparsegpt 2:4": (1, "ce916261ce55", 28.094464),
    "admm 50%": (1, "1f9e2c8a835a", 27.840623),
    "admm 2:4": (1, "f55e9e3ca57b", 26.928896),
    "ria 50%": (1, "15f707e1ffce", 28.279722),
    "ria 2:4": (1, "814cbf5674f7", 27.475469),
    "magnitude 50%": (1, "47e31ba06cd9", 28.334993),
    "magnitude 2:4": (1, "7399b5e73648", 27.539246),
    "wanda neurons": (1, "32e76b2beb93", 25.010113),
    "sparsegpt neurons": (1, "32e76b2beb93", 25.374118),
    "admm neurons": (1, "32e76b2beb93", 24.986727),
    "magnitude neurons": (1, "32e76b2beb93", 25.299947),
    "reap experts": (1, "29457c392725", 36.842374),
    "contribution experts": (1, "29457c392725", 36.842374),
    "frequency experts": (1, "29457c392725", 36.80216),
    "random experts": (1, "29457c392725", 36.972258),
    "quantize int4": (2, "3a88aae96841", 27.424093),
    "quantize q4_0": (2, "7aeac5bdf41c", 27.409579),
}
PATTERNS = {"50%": Sparsity(0.5), "2:4": Sparsity(0.5, 2, 4)}
NEURON_METHODS = [name for name in METHODS if name != "ria"]
CASES = [f"{name} {kind}" for name in METHODS for kind in PATTERNS]
CASES += [f"{name} neurons" for name in NEURON_METHODS]
CASES += [f"{name} experts" for name in EXPERT_METHODS] + ["quantize int4", "quantize q4_0"]


def result(case: str) -> tuple[int, str, float]:
    name, kind = case.split()
    mixture = dict(num_local_experts=6) if kind == EXPERTS else {}
    model = tiny.ALL["Mixtral" if mixture else "Llama"](**mixture).requires_grad_(False)
    model = model if kind in (NEURONS, EXPERTS) else model.double()
    runner, ids = runner_of(model), windows(8)
    if name == "quantize":
        prune_(runner, "magnitude", PATTERNS["2:4"])
        quantize(runner, ids, FORMATS[kind])
        return GPTQ.revision, *digested(model)
    method = method_of(name)
    if kind in PATTERNS:
        prune_(runner, name, PATTERNS[kind], ids)
    else:
        layout = layout_of(kind, model)
        remove(runner, ids, method, layout, layout.count // 2)
    return method.revision, *digested(model)


def digested(model: nn.Module) -> tuple[str, float]:
    """Digest of what is 0 and of the shapes, and the norm of the weights."""
    hasher, total = hashlib.sha256(), 0.0
    for name, parameter in model.model.layers.named_parameters():
        hasher.update(f"{name}{[*parameter.shape]}".encode())
        hasher.update(np.packbits((parameter == 0).numpy()).tobytes())
        total += float(parameter.double().square().sum())
    return hasher.hexdigest()[:12], total**0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_what_is_given_belongs_to_the_revision(case: str) -> None:
    revision, masks, norm = result(case)
    before = GIVEN[case]
    same = masks == before[1] and norm == pytest.approx(before[2], rel=1e-5)
    now = revision, masks, float(f"{norm:.8g}")
    if not same:
        assert revision > before[0], f"raise the revision, and write here {now}; it was {before}"
    assert (same, revision) == (True, before[0]), f"write here {now}; it was {before}"
