"""Types by tensor: estimated costs against those of rounding, and the choice among all."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import tiny
import torch
from support import FORMATS, runner_of, windows
from torch import Tensor
from transformers import PreTrainedModel

from lib.calibration.mixed_types import (
    COMPENSATED,
    Costs,
    choose,
    measure,
    round_tables_,
    sizes_of,
    tables_of,
)
from lib.formats.grids import Types
from lib.model.reference import tail_of
from lib.quantize import quantize


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2"])
def test_a_cost_is_the_divergence_of_rounding_one_tensor(name: str) -> None:
    """In nats over all tokens; where the estimate's error compensation is left out."""
    torch.manual_seed(0)
    model = tiny.ALL[name]().requires_grad_(False).float()
    runner, ids = runner_of(model), windows(8)
    sizes = sizes_of(model, runner.name, model.get_input_embeddings().num_embeddings)
    dense, costs = log_probabilities(model, ids), measure(runner, ids, sizes)
    assert costs.keys() == sizes.keys()
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    ratios = {}
    for key, types in costs.items():
        weight, transposed = model.get_parameter(key), name == "GPT-2" and ".h." in key
        kept, share = weight.clone(), 1 if id(weight) in tables else COMPENSATED
        rows = weight.T if transposed else weight
        rows.copy_(FORMATS["iq4_nl"].nearest(rows))
        found = log_probabilities(model, ids)
        weight.copy_(kept)
        divergence = (dense.exp() * (dense - found)).sum()
        ratios[key] = float(types["iq4_nl"] / share / divergence)
        assert types["iq4_nl"] > 2 * types["q5_0"] > 20 * types["q8_0"]
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    assert 0.8 < torch.tensor([*ratios.values()]).log().mean().exp() < 1.25


def test_the_choice_is_nearly_the_best() -> None:
    """Of all choices, none costs less in as many bytes, less those of the largest step."""
    torch.manual_seed(0)
    kinds = "q3_k", "iq4_nl", "q5_0", "q8_0"
    costs: Costs = {}
    sizes: Costs = {}
    for tensor in map(str, range(5)):
        size, cost = 100 + 900 * float(torch.rand(())), float(torch.rand(()).exp())
        each = cost * torch.tensor([1, 0.3, 0.1, 0.002]) * (1 + torch.rand(4))
        costs[tensor] = dict(zip(kinds, each.tolist(), strict=True))
        bits = zip(kinds, (3.4375, 4.5, 5.5, 8.5), strict=True)
        sizes[tensor] = {kind: size * b for kind, b in bits if (tensor, kind) != ("3", "q3_k")}

    def totals(chosen: dict[str, str]) -> tuple[float, float]:
        pairs = chosen.items()
        return sum(costs[n][kind] for n, kind in pairs), sum(sizes[n][kind] for n, kind in pairs)

    every = [totals(dict(zip(sizes, each, strict=True))) for each in product(*sizes.values())]
    least, largest = min(size for _, size in every), max(size for _, size in every)
    step = max(max(types.values()) - min(types.values()) for types in sizes.values())
    for budget in torch.linspace(least + 1, largest, 40).tolist():
        cost, size = totals(choose(costs, sizes, budget))
        best = min((c for c, s in every if s <= budget - step), default=float("inf"))
        assert size <= budget and cost <= best + 1e-9
    assert set(choose(costs, sizes, largest + 1).values()) == {"q8_0"}


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_rounded_by_the_inputs_of_the_head(tied: bool) -> None:
    """Those of the quantized model; the dense model of comparisons keeps its own tables."""
    model = tiny.build("llama", tie_word_embeddings=tied).requires_grad_(False).float()
    runner, ids, head = runner_of(model), windows(8), model.lm_head
    kept, tail = head.weight.clone(), tail_of(runner)
    inputs = quantize(runner, ids, FORMATS["iq4_nl"]).head_inputs()
    seen = model.model(input_ids=ids).last_hidden_state
    assert torch.allclose(inputs, seen.double().square().sum((0, 1)), rtol=1e-4)
    inputs[::2] *= 100
    errors = []
    for costs in (None, inputs):
        rounded = copy.deepcopy(model)
        types = dict.fromkeys(tables_of(rounded), "iq4_nl")
        round_tables_(rounded, Types("auto", types), costs)
        errors.append(float(((rounded.lm_head.weight - kept).square() @ inputs.float()).sum()))
    assert 0 < errors[1] < 0.9 * errors[0]
    round_tables_(model, Types("auto", types))
    assert torch.equal(tail.model.lm_head.weight, kept) and not torch.equal(head.weight, kept)
