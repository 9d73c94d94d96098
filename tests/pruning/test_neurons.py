"""Neurons removed from whole models: against slow references, and as a run that a user starts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, layout_of, loaded, results, runner_of, succeed, weights, windows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.methods.registry import method_of
from lib.methods.sparsity import NEURONS
from lib.model.parts import PartLayout, get_tensor
from lib.model.pretrained import decoder_blocks
from lib.remove import PartRemover, neurons_left, remove
from lib.util.errors import UserError

NAMES = ["Llama", "Gemma 3", "GPT-2", "Phi", "GPT-NeoX", "Phi-3"]
NAMES += [name for name in tiny.VISION if "MoE" not in name]
pytestmark = pytest.mark.filterwarnings("ignore")


def pruned(model: nn.Module, name: str, ids: Tensor, left: int, batch_size: int = 2) -> PartRemover:
    runner = runner_of(model, batch_size)
    return remove(runner, ids, method_of(name), layout_of(NEURONS, model), left)


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


def rows_norms(block: nn.Module, layout: PartLayout, index: int) -> Tensor:
    """Norms of the rows that make each neuron (producers, width)."""
    norms = []
    for path, (dim, entries) in layout.tensors[index].items():
        weight = get_tensor(block, path)
        if weight.dim() > 1 and not path.startswith(layout.modules[index]):
            norms += list(weight.double().norm(dim=1 - dim).view(entries, -1))
    return torch.stack(norms)


@torch.no_grad()
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", NAMES)
def test_as_whole_passes_with_hooks(name: str, method: str) -> None:
    model, ids = tiny.ALL[name](), windows(6)
    layout, blocks = layout_of(NEURONS, model), decoder_blocks(model)[1]
    for tensors, block in zip(layout.tensors, blocks, strict=True):
        first, (dim, _) = next(iter(tensors.items()))  # of rows of unlike norms
        weight = get_tensor(block, first)
        scale = torch.logspace(-1, 1, weight.shape[dim])
        weight.mul_(scale if dim else scale[:, None])
    reference = copy.deepcopy(model)
    left = layout.count - 20
    done = pruned(model, method, ids, left)
    assert [notes.kept for notes in done.notes] == by_hooks(reference, method, ids, left)
    out = model(input_ids=ids, use_cache=False).logits
    expected = reference(input_ids=ids, use_cache=False).logits
    assert torch.allclose(out, expected, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("width", "ratio", "left"),
    [(2048, 0.25, 1536), (9216, 0.3, 6400), (2047, 0.25, 1536), (688, 0.25, 512), (64, 0.99, 8)],
)
def test_the_number_left_is_a_multiple(width: int, ratio: float, left: int) -> None:
    assert neurons_left(PartLayout(NEURONS, width, "intermediate_size"), ratio) == left


def test_a_ratio_that_removes_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match="--sparsity_ratio 0.05: it removes none of the 64 neurons .* multiple of 8"
    ):
        neurons_left(PartLayout(NEURONS, 64, "intermediate_size"), 0.05)


class Mixing(nn.Module):
    """An activation that divides neurons by their norm, so that each depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_neurons_that_depend_on_each_other_are_noticed(method: str) -> None:
    model = tiny.tiny_llama()
    model.model.layers[1].mlp.act_fn = Mixing()
    with pytest.raises(UserError, match=r"layers\.1: its MLP does not only multiply by neurons"):
        pruned(model, method, windows(4), 40)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "method"),
    [("Llama", "sparsegpt"), ("GPT-2", "wanda"), ("Qwen3-VL", "admm")],
)
def test_a_run_saves_what_loads_anywhere(name: str, method: str) -> None:
    tiny.write_model("model", tiny.ALL[name]())
    tiny.write_texts("uk", test=3)
    flags = [*QUICK, "--prune_method", method, "--calibration_data", "uk", "--save", "out"]
    flags += ["--sparsity_type", "neurons", "--sparsity_ratio", "0.25", "--save_model", "new"]
    done = succeed("--model", "model", *flags)
    neurons = results()["neurons"]
    left = neurons["before"] * 3 // 4
    model = loaded("new")
    config = model.config.get_text_config()
    assert neurons["after"] == left and left in config.to_dict().values()
    assert not {"auto_map", "quantization_config"} & model.config.to_dict().keys()  # as any other
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert all(len(removed) == neurons["before"] - left for removed in neurons["removed"])
    saved = sum(tensor.nbytes for tensor in weights("new").values())
    assert saved == neurons["bytes_after"] < neurons["bytes_before"]
    assert f"removed {neurons['before'] - left} of {neurons['before']} neurons" in done.out
    assert str(left) in Path("new/README.md").read_text("utf-8")
