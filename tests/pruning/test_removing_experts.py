"""Experts removed from mixtures: against the model's own forward that can't choose them."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, layout_of, results, runner_of, weights, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lib.methods.registry import method_of
from lib.methods.sparsity import EXPERTS
from lib.model.parts import PartLayout
from lib.model.pretrained import decoder_blocks
from lib.remove import PartRemover, experts_left, remove
from lib.util.errors import UserError

NAMES = ["Mixtral", "Qwen3-MoE", "OLMoE", "GPT-OSS", "DeepSeek-V3", "PhiMoE", "GraniteMoE", "Jamba"]
pytestmark = pytest.mark.filterwarnings("ignore")


def mixture(name: str) -> nn.Module:
    """Six experts (DeepSeek-V3: two groups of four), with terms that correct scores."""
    grouped = dict(n_routed_experts=8, num_experts_per_tok=2)
    fields = grouped if name == "DeepSeek-V3" else dict(num_experts=6, num_local_experts=6)
    model = tiny.ALL[name](**fields)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)).flip(0))
    return model


def pruned(model: nn.Module, method: str, ids: Tensor, left: int) -> PartRemover:
    layout = layout_of(EXPERTS, model)
    return remove(runner_of(model, 2), ids, method_of(method), layout, left)


def forbid_(model: nn.Module, removed: list[list[int]]) -> None:
    """Let routers give the removed experts the lowest score: none is chosen, no gate changes."""

    def lowered(linear, gone):
        def product(x, weight, bias=None):
            logits = linear(x, weight, bias)
            if len(weight) != len(gone):
                return logits
            return logits.masked_fill(gone, torch.finfo(logits.dtype).min)

        return product

    for block, gone in zip(decoder_blocks(model)[1], removed, strict=True):
        for path, module in block.named_modules():
            if path.endswith((".gate", ".router")) and gone:
                mask = torch.isin(torch.arange(len(module.weight)), torch.tensor(gone))
                forward = module.forward

                def routed(*args, forward=forward, mask=mask, **kwargs):
                    before = nn.functional.linear
                    nn.functional.linear = lowered(before, mask)
                    try:
                        return forward(*args, **kwargs)
                    finally:
                        nn.functional.linear = before

                module.forward = routed
                bias = getattr(module, "e_score_correction_bias", None)
                if bias is not None:
                    bias.masked_fill_(mask, -10.0)


@torch.no_grad()
@pytest.mark.parametrize("method", ["reap", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_as_if_the_removed_could_not_be_chosen(name: str, method: str) -> None:
    model, ids = mixture(name), windows(4)
    reference, layout = copy.deepcopy(model), layout_of(EXPERTS, model)
    done = pruned(model, method, ids, 4)
    removed = done.record()["removed"]
    assert {len(one) for one, path in zip(removed, layout.modules, strict=True) if path} == {
        layout.count - 4
    }
    if layout.groups > 1:  # as many of each group
        assert all(sum(i < 4 for i in one) == 2 for one in removed if one)
    forbid_(reference, removed)
    out = model(input_ids=ids, use_cache=False).logits
    expected = reference(input_ids=ids, use_cache=False).logits
    assert torch.allclose(out, expected, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_the_scores_are_those_of_the_paper() -> None:
    """By hand in float64, on the first block, of which the inputs are the embeddings' outputs."""
    model, ids = mixture("Mixtral"), windows(4)
    block, seen = model.model.layers[0], []
    handle = block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    x = torch.cat(seen).double()
    gates = (x @ block.mlp.gate.weight.double().T).softmax(-1)
    top = gates.topk(2).values
    gates = gates.where(gates >= top[:, 1:], 0) / top.sum(1, keepdim=True)
    score, counts = [], (gates > 0).sum(0)
    for expert in range(6):
        rows = gates[:, expert] > 0
        gate, up = (x[rows] @ block.mlp.experts.gate_up_proj[expert].double().T).chunk(2, 1)
        out = (nn.functional.silu(gate) * up) @ block.mlp.experts.down_proj[expert].double().T
        score.append((gates[rows, expert] * out.norm(dim=1)).mean().item())
    sums = [each * count for each, count in zip(score, counts.tolist(), strict=True)]
    chosen = {"reap": score, "contribution": sums, "frequency": counts.tolist()}
    for (method, of), left in product(chosen.items(), (2, 3, 4)):
        done = pruned(copy.deepcopy(model), method, ids, left)
        lowest = sorted(range(6), key=lambda expert: of[expert])[: 6 - left]
        assert done.record()["removed"][0] == sorted(lowest), method
        shares = (counts / counts.sum()).tolist()
        assert done.notes[0].routed == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "chosen", "groups", "ratio", "left"),
    [
        (8, 2, (1, 1), 0.25, 6),
        (8, 2, (1, 1), 0.05, "remove 0 of .* Use 0.125 to 0.75."),
        (8, 2, (1, 1), 0.9, "remove 7 of .* Use 0.125 to 0.75."),
        (256, 8, (8, 4), 0.5, 128),
        (256, 8, (8, 4), 0.97, "remove 248 of .* Use 0.0312 to 0.938."),
        (4, 4, (1, 1), 0.5, "none of .* can be removed, since the router chooses 4"),
    ],
)
def test_how_many_stay(count, chosen, groups, ratio, left) -> None:
    layout = PartLayout(EXPERTS, count, "num_experts", (), (), (), chosen, *groups)
    if isinstance(left, int):
        assert experts_left(layout, ratio) == left
        return
    with pytest.raises(UserError, match=left):
        experts_left(layout, ratio)


@pytest.mark.parametrize("name", ["Llama", "JetMoE"])
def test_models_without_such_experts_are_refused(name: str) -> None:
    model = tiny.ALL[name]()
    with pytest.raises(UserError, match="--sparsity_type experts: .*[.] Use --sparsity_type unstr"):
        pruned(model, "reap", windows(2), 3)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_a_run_saves_what_loads_anywhere(name: str) -> None:
    tiny.write_model("model", mixture(name))
    tiny.write_texts("uk", test=3)
    flags = [*QUICK, "--prune_method", "reap", "--sparsity_type", "experts", "--save", "out"]
    flags += ["--calibration_data", "uk", "--sparsity_ratio", "0.5", "--recover", "96"]
    done = call("--model", "model", *flags, "--save_model", "new")
    assert done.status == 0, done.err
    experts = results()["experts"]
    model = AutoModelForCausalLM.from_pretrained("new")
    assert experts["after"] == experts["before"] // 2 in model.config.to_dict().values()
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    saved = {path: tensor.nbytes for path, tensor in weights("new").items()}
    saved = sum(size for path, size in saved.items() if not path.endswith("correction_bias"))
    assert saved == experts["bytes_after"] < experts["bytes_before"]
    assert f"{experts['after']} of its {experts['before']} experts" in Path(
        "new/README.md"
    ).read_text("utf-8")
    again = call("--model", "new", "--eval_only", "--eval_data", "uk", *QUICK, "--save", "again")
    assert again.status == 0, again.err
    assert results("again")["perplexity"] == pytest.approx(results()["perplexity"], rel=1e-5)
