"""Neurons and experts removed from whole models: against slow references, and as a user does it."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from support import (
    QUICK,
    layout_of,
    loaded,
    refused,
    reloaded,
    representative,
    results,
    runner_of,
    succeed,
    weights,
    windows,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.methods.registry import method_of
from lib.methods.sparsity import EXPERTS, NEURONS
from lib.model.parts import StructureLayout, get_tensor
from lib.model.skeleton import decoder_blocks
from lib.stages.remove import PartRemover, experts_left, neurons_left, remove

NAMES = ["Llama", "Gemma 3", "GPT-2", "Phi", "GPT-NeoX", "Phi-3"]
NAMES += [name for name in tiny.VISION if "MoE" not in name]
OF_EXPERTS = "Mixtral Qwen3-MoE OLMoE GPT-OSS DeepSeek-V3 PhiMoE GraniteMoE Jamba".split()
pytestmark = pytest.mark.filterwarnings("ignore")


def pruned(kind: str, model: nn.Module, method: str, ids: Tensor, left: int) -> PartRemover:
    return remove(runner_of(model, 2), ids, method_of(method), layout_of(kind, model), left)


@torch.no_grad()
def by_hooks(model: nn.Module, method: str, ids: Tensor, left: int) -> list[list[int]]:
    """Neurons that stay, block after block, by whole forward passes; `model` keeps its shapes.

    A removed neuron is one that down ignores. For all methods but admm, in float64.
    """
    stay = []
    layout = layout_of(NEURONS, model)
    for index, block in enumerate(decoder_blocks(model)[1]):
        down, seen = block.get_submodule(layout.modules[index]), []
        handle = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for window in ids:
            model(input_ids=window[None], use_cache=False)
        handle.remove()
        x = torch.cat([one.flatten(0, -2) for one in seen]).double()
        weight = down.weight.data if isinstance(down, Conv1D) else down.weight.data.T  # (in, out)
        solution, inverse = weight.double().clone(), torch.eye(len(weight)).double()
        hessian = x.T @ x
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        if method == "sparsegpt":
            inverse = torch.linalg.inv(hessian)
        alive = list(range(len(hessian)))
        while len(alive) > left:
            if method == "sparsegpt":
                score = solution.square().sum(1) / inverse.diagonal()
            elif method == "wanda":
                score = solution.norm(dim=1) * x.norm(dim=0)
            else:
                score = solution.norm(dim=1) * rows_norms(block, layout, index).prod(0)
            lowest = sorted(alive, key=lambda row: score[row].item())
            gone = lowest[: min(16, len(alive) - left)]
            alive = [row for row in alive if row not in gone]
            if method == "sparsegpt":  # the others make up for them
                rest = torch.tensor(alive)
                inner = torch.linalg.inv(hessian[rest[:, None], rest])
                target = hessian @ weight.double()
                solution, inverse = torch.zeros_like(solution), torch.eye(len(hessian)).double()
                solution[rest], inverse[rest[:, None], rest] = inner @ target[rest], inner
        weight.zero_()[alive] = solution[alive].float()
        stay.append(alive)
    return stay


def rows_norms(block: nn.Module, layout: StructureLayout, index: int) -> Tensor:
    """Norms of the rows that make each neuron (producers, width)."""
    norms = []
    for path, (dim, entries) in layout.tensors[index].items():
        weight = get_tensor(block, path)
        if weight.dim() > 1 and not path.startswith(layout.modules[index]):
            norms += list(weight.double().norm(dim=1 - dim).view(entries, -1))
    return torch.stack(norms)


@torch.no_grad()
@pytest.mark.parametrize("name", representative(NAMES, ["Llama", "GPT-2", "Phi-3"]))
def test_neurons_go_as_by_whole_passes_with_hooks(name: str) -> None:
    for method in ("magnitude", "wanda", "sparsegpt"):
        model, ids = tiny.ALL[name](), windows(6)
        layout, blocks = layout_of(NEURONS, model), decoder_blocks(model)[1]
        for tensors, block in zip(layout.tensors, blocks, strict=True):
            first, (dim, _) = next(iter(tensors.items()))  # of rows of unlike norms
            weight = get_tensor(block, first)
            scale = torch.logspace(-1, 1, weight.shape[dim])
            weight.mul_(scale if dim else scale[:, None])
        reference = copy.deepcopy(model)
        left = layout.count - 20
        done = pruned(NEURONS, model, method, ids, left)
        assert [notes.kept for notes in done.notes] == by_hooks(reference, method, ids, left)
        out = model(input_ids=ids, use_cache=False).logits
        expected = reference(input_ids=ids, use_cache=False).logits
        assert torch.allclose(out, expected, atol=2e-3 * expected.abs().max().item())


class Mixing(nn.Module):
    """An activation that divides neurons by their norm, so that each depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_neurons_that_depend_on_each_other_are_noticed(method: str) -> None:
    model = tiny.tiny_llama()
    model.model.layers[1].mlp.act_fn = Mixing()
    assert "layers.1: " in refused(pruned, NEURONS, model, method, windows(4), 40)


# --- experts, against the model's own forward that can't choose them


def mixture(name: str) -> nn.Module:
    """Six experts (DeepSeek-V3: two groups of four), with terms that correct scores."""
    grouped = dict(n_routed_experts=8, num_experts_per_tok=2)
    fields = grouped if name == "DeepSeek-V3" else dict(num_experts=6, num_local_experts=6)
    model = tiny.ALL[name](**fields)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)).flip(0))
    return model


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
@pytest.mark.parametrize(
    "name", representative(OF_EXPERTS, ["Mixtral", "GPT-OSS", "DeepSeek-V3", "Jamba"])
)
def test_as_if_the_removed_experts_could_not_be_chosen(name: str, method: str) -> None:
    model, ids = mixture(name), windows(4)
    reference, layout = copy.deepcopy(model), layout_of(EXPERTS, model)
    removed = pruned(EXPERTS, model, method, ids, 4).record()["removed"]
    counts = {len(one) for one, path in zip(removed, layout.modules, strict=True) if path}
    assert counts == {layout.count - 4}
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
        done = pruned(EXPERTS, copy.deepcopy(model), method, ids, left)
        lowest = sorted(range(6), key=lambda expert: of[expert])[: 6 - left]
        assert done.record()["removed"][0] == sorted(lowest), method
        shares = (counts / counts.sum()).tolist()
        assert done.notes[0].routed == pytest.approx(shares, abs=1e-6)


# --- how many stay, and runs


def test_how_many_stay() -> None:
    for width, ratio, left in [(2048, 0.25, 1536), (9216, 0.3, 6400), (2047, 0.25, 1536),
                               (688, 0.25, 512), (64, 0.99, 8)]:  # fmt: skip
        assert neurons_left(StructureLayout(NEURONS, width, "intermediate_size"), ratio) == left
    line = refused(neurons_left, StructureLayout(NEURONS, 64, "intermediate_size"), 0.05)
    assert "--sparsity_ratio 0.05: " in line and "multiple of 8" in line

    def experts(count: int, chosen: int, groups: tuple[int, int], ratio: float) -> int:
        layout = StructureLayout(EXPERTS, count, "num_experts", (), (), (), chosen, *groups)
        return experts_left(layout, ratio)

    assert experts(8, 2, (1, 1), 0.25) == 6 and experts(256, 8, (8, 4), 0.5) == 128
    assert "0.125 to 0.75" in refused(experts, 8, 2, (1, 1), 0.05)
    assert "0.125 to 0.75" in refused(experts, 8, 2, (1, 1), 0.9)
    assert "0.0312 to 0.938" in refused(experts, 256, 8, (8, 4), 0.97)
    assert "chooses 4" in refused(experts, 4, 4, (1, 1), 0.5)
    for name in ("Llama", "JetMoE"):
        line = refused(pruned, EXPERTS, tiny.ALL[name](), "reap", windows(2), 3)
        assert "--sparsity_type experts: " in line


RUNS = [("Qwen3-VL", "admm", NEURONS), ("DeepSeek-V3", "reap", EXPERTS)]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("name", "method", "kind"), RUNS)
def test_a_run_saves_what_loads_anywhere(name: str, method: str, kind: str) -> None:
    tiny.write_model("model", mixture(name) if kind == EXPERTS else tiny.ALL[name]())
    tiny.write_texts("uk", test=3)
    flags = [*QUICK, "--prune_method", method, "--calibration_data", "uk", "--save", "out"]
    flags += ["--sparsity_type", kind, "--sparsity_ratio", 0.25 if kind == NEURONS else 0.5]
    flags += ["--recover", "96"] if kind == EXPERTS else []
    done = succeed("--model", "model", *flags, "--save_model", "new")
    found = results()[kind]
    left = found["before"] * 3 // 4 if kind == NEURONS else found["before"] // 2
    model = loaded("new")
    config = model.config.get_text_config().to_dict()
    assert found["after"] == left and left in config.values()
    assert not {"auto_map", "quantization_config"} & model.config.to_dict().keys()  # as any other
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    gone = {len(removed) for removed in found["removed"] if removed}
    assert gone == {found["before"] - left}
    saved = {path: tensor.nbytes for path, tensor in weights("new").items()}
    saved = sum(size for path, size in saved.items() if not path.endswith("correction_bias"))
    assert saved == found["bytes_after"] < found["bytes_before"]
    assert f"{found['before'] - left} of {found['before']}" in done.out or kind == EXPERTS
    assert str(left) in Path("new/README.md").read_text("utf-8")
    reloaded("new", "out", "--eval_data", "uk", rel=1e-5)
