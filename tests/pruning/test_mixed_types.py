"""Types by tensor: estimated costs against those of rounding, and the choice among all."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch
from support import FORMATS, GRIDS, runner_of, windows
from torch import Tensor
from transformers import PreTrainedModel

from lib.calibration.mixed_types import (
    Costs,
    choose,
    measure,
    sizes_of,
)
from lib.formats.grids import Types
from lib.model.reference import tail_of
from lib.stages.quantize import quantize


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2"])
def test_a_cost_is_the_divergence_of_rounding_one_tensor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In nats over all tokens; where the estimate's error compensation is left out."""
    monkeypatch.setattr("lib.calibration.mixed_types.COMPENSATED", 1.0)
    torch.manual_seed(0)
    model = tiny.ALL[name]().requires_grad_(False).float()
    runner, ids = runner_of(model), windows(8)
    sizes = sizes_of(model, runner.name, model.get_input_embeddings().num_embeddings)
    dense, costs = log_probabilities(model, ids), measure(runner, ids, sizes)
    assert costs.keys() == sizes.keys()
    ratios = {}
    for key, types in costs.items():
        weight, transposed = model.get_parameter(key), name == "GPT-2" and ".h." in key
        kept = weight.clone()
        rows = weight.T if transposed else weight
        rows.copy_(FORMATS["iq4_nl"].nearest(rows))
        found = log_probabilities(model, ids)
        weight.copy_(kept)
        divergence = (dense.exp() * (dense - found)).sum()
        ratios[key] = float(types["iq4_nl"] / divergence)
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


def test_inputs_that_llama_cpp_moves_get_types_that_stay_whole() -> None:
    """MLA's matrix is transposed in part, and Qwen 3.5's heads of 128 inputs are reordered."""
    model = tiny.build("deepseek_v3", **tiny.LATENT | tiny.GROUPED | dict(kv_lora_rank=256))
    sizes = sizes_of(model, "model.layers", tiny.VOCAB)
    assert [*sizes["model.layers.0.self_attn.kv_b_proj.weight"]] == ["q8_0"]
    assert len(sizes["model.layers.0.self_attn.o_proj.weight"]) == 3  # 32 wide
    kv, out = "self_attn.kv_b_proj.weight", "layers.0.linear_attn.out_proj.weight"
    for form in (FORMATS[name] for name in GRIDS):
        assert form.of(f"layers.0.{kv}", 512) is None and form.bits_of(f"0.{kv}", 512) == 8.5
    assert FORMATS["q3_k"].of(out, 512).name == "iq4_nl" and FORMATS["q5_0"].of(out, 512)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["iq4_nl", "q8_0"])
def test_the_head_is_quantized_by_its_inputs(layers: str, tied: bool) -> None:
    """Its outputs change less than by rounding; the dense model of comparisons keeps its own.

    Layers of q8_0 are rounded in the file alone.
    """
    model = tiny.build("llama", tie_word_embeddings=tied).requires_grad_(False).float()
    runner, ids, head = runner_of(model), windows(8), model.lm_head
    kept, tail = head.weight.clone(), tail_of(runner)
    names = [*sizes_of(model, runner.name, len(kept))]
    types = {name: layers if ".layers." in name else "iq4_nl" for name in names}
    quantizer = quantize(runner, ids, Types(types))
    assert any("linear layers" in line for line in quantizer.summary()) == (layers == "iq4_nl")
    assert torch.equal(head.weight, kept)
    quantizer.quantize_tables_()
    inputs, nearest = model.model(input_ids=ids).last_hidden_state, FORMATS["iq4_nl"].nearest(kept)
    assert FORMATS["iq4_nl"].is_on_grid(head.weight)
    errors = [float((inputs @ (each - kept).T).norm()) for each in (head.weight, nearest)]
    assert 0 < errors[0] < 0.95 * errors[1]
    assert torch.equal(tail.model.lm_head.weight, kept)
    embedding = model.get_input_embeddings().weight
    assert FORMATS["iq4_nl"].is_on_grid(embedding) and tied == torch.equal(embedding, head.weight)
