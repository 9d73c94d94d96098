"""Every architecture: the sweep is the model's own forward, and pruned models survive a reload."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lib.eval import perplexity
from lib.methods.registry import Recipe
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.pretrained import decoder_blocks
from lib.prune import Pruned, Pruner
from lib.util.errors import UserError

CPU = torch.device("cpu")
BATCH = 2  # of the windows below: the last batch is smaller
HALF = Sparsity(0.5)

# streams of hidden states that are not (windows, tokens, hidden), or changed between the blocks
REFUSED = {
    "Gemma 3n": tiny.HYBRIDS["Gemma 3n"],
    "RWKV, rescaled every 2 blocks": partial(
        tiny.build, "rwkv", attention_hidden_size=32, num_hidden_layers=4, rescale_every=2
    ),
}
HYBRIDS = {name: make for name, make in tiny.HYBRIDS.items() if name not in REFUSED}
ALL = tiny.ARCHITECTURES | HYBRIDS


def windows(count: int, tokens: int = 24, seed: int = 0) -> Tensor:
    """Random token ids (count, tokens), longer than the sliding windows."""
    return torch.randint(3, 300, (count, tokens), generator=torch.Generator().manual_seed(seed))


def swept(model: PreTrainedModel) -> tuple[BlockRunner, str]:
    name, blocks = decoder_blocks(model)
    return BlockRunner(model, blocks, CPU), name


def pruned(model: PreTrainedModel, method: str) -> Pruned:
    runner, name = swept(model)
    runner.verify()
    return Pruner(runner, name, Recipe(method), HALF).run(windows(5), BATCH)


def perplexity_of(model: PreTrainedModel) -> float:
    runner, _ = swept(model)
    return perplexity(runner, windows(3, seed=1), BATCH).value


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """{name: weight} of all matrices in the decoder blocks but routers: what is to be pruned."""
    name, blocks = decoder_blocks(model)
    found = {}
    for path, module in blocks.named_modules(prefix=name):
        kind = type(module).__name__
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            found[f"{path}.weight"] = module.weight
        elif kind.endswith("Experts"):
            found |= {f"{path}.{n}": p for n, p in module.named_parameters() if p.dim() == 3}
    routers = ("router", "expert_gate")
    return {name: w for name, w in found.items() if not any(word in name for word in routers)}


def told_of(parameter: str, names: Iterable[str]) -> bool:
    """Whether a parameter, its linear or its first expert is among the names."""
    known = (parameter, parameter.removesuffix(".weight"), f"{parameter}.0")
    return not set(names).isdisjoint(known)


@pytest.mark.parametrize("name", ALL)
def test_the_unpruned_sweep_is_the_models_own_forward(name: str) -> None:
    model = ALL[name]()
    ids = windows(5)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    runner, _ = swept(model)
    states = runner.capture(ids, BATCH, CPU)
    for index in range(len(runner.blocks)):
        runner.advance_(states, index)
    kept = torch.tensor([0, 7, 8, 23])
    logits = torch.cat([runner.logits(states, batch, kept) for batch in states.batches])
    torch.testing.assert_close(logits, expected[:, kept], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_half_of_every_matrix_goes_and_the_rest_survives_a_reload(
    name: str, method: str, tmp_path: Path
) -> None:
    model, _ = check_pruned_and_reloaded(ALL[name](), method, tmp_path)
    for parameter, weight in matrices(model).items():
        assert (weight == 0).sum() * 2 == weight.numel(), parameter


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_pruned_or_say_what_was_left(name: str, method: str, tmp_path: Path) -> None:
    model, done = check_pruned_and_reloaded(ALL[name](), method, tmp_path)
    found = matrices(model)
    dense = {parameter for parameter in found if told_of(parameter, done.left)}
    assert len(dense) < len(found) / 3
    for parameter in found.keys() - dense:
        assert (found[parameter] == 0).sum() * 2 == found[parameter].numel(), parameter


@pytest.mark.parametrize("name", ALL)
def test_inputs_in_order_beside_the_untouched_model(name: str) -> None:
    """ADMM takes a block's inputs one by one and silences linears: the others do neither."""
    model = ALL[name]()
    done = pruned(model, "admm")
    assert perplexity_of(model) < float("inf")
    for parameter, weight in matrices(model).items():
        if not told_of(parameter, done.left):
            assert (weight == 0).sum() * 2 == weight.numel(), parameter
    for part in model.modules():
        assert "forward" not in vars(part), part


def check_pruned_and_reloaded(
    model: PreTrainedModel, method: str, folder: Path
) -> tuple[PreTrainedModel, Pruned]:
    """Prune, save and load again; what is no matrix of a block must stay as it was."""
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = perplexity_of(model)
    done = pruned(model, method)
    expected = perplexity_of(model)
    assert expected != pytest.approx(dense, rel=1e-4)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    assert perplexity_of(again) == pytest.approx(expected, rel=1e-6)
    touched = matrices(again)
    for name, tensor in again.state_dict().items():
        if name not in touched:
            assert torch.equal(tensor, original[name]), name
    return again, done


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "GPT-OSS"])
def test_each_expert_is_pruned_by_the_tokens_routed_to_it(name: str) -> None:
    dense, model = ALL[name](), ALL[name]()
    pruned(model, "wanda")
    path, experts = next(
        (path, module) for path, module in dense.named_modules() if path.endswith("experts")
    )
    calls = []
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        dense(input_ids=windows(5), use_cache=False)
    hidden, chosen, *_ = calls[0]  # (tokens, hidden), (tokens, experts per token)
    for expert in range(4):
        x = hidden[(chosen == expert).any(-1)]
        before = experts.gate_up_proj[expert]
        after = model.get_submodule(path).gate_up_proj[expert]
        if name == "GPT-OSS":  # keeps (in, out)
            before, after = before.T, after.T
        lowest = (before.abs() * x.norm(dim=0)).argsort()[:, : x.shape[1] // 2]
        assert torch.equal(after, before.scatter(1, lowest, 0))


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_skipped_silently(name: str) -> None:
    model = ALL[name]()
    done = pruned(model, "magnitude")
    assert all(done.why[name] for name in done.left)
    blocks_name, blocks = decoder_blocks(model)
    for parameter, weight in blocks.named_parameters(prefix=blocks_name):
        if weight.dim() > 1 and not parameter.endswith("bias"):
            assert told_of(parameter, [*done.pruned, *done.left]), parameter


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_the_sweep_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="can't be pruned"):
        pruned(REFUSED[name](), "wanda")
