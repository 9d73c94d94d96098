"""Neurons removed from whole models: against slow references, and as runs that a user starts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import processes
import pytest
import tiny
import torch
from support import ALONE, QUICK, Done, call, results, runner_of, weights, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lib.methods.registry import METHODS, MethodSpec
from lib.model.access import Checkpoint
from lib.model.mlp import MlpLayout, find_mlps
from lib.model.pretrained import decoder_blocks, skeleton
from lib.pruning.neurons import NeuronPruner, count_left
from lib.commands import languages
from lib.util.bits import from_hex, to_hex
from lib.util.errors import UserError

NAMES = ["Llama", "Gemma 3", "Qwen2", "GPT-2", "Phi", "GPT-NeoX", "Phi-3", "Gemma 3 multimodal"]
NEURONS = ["--sparsity_type", "neurons", "--sparsity_ratio", "0.25", "--neurons_multiple", "16"]
pytestmark = pytest.mark.filterwarnings("ignore")


def layout_of(model: nn.Module) -> MlpLayout:
    bare = skeleton(model.config)
    return find_mlps(model.config, Checkpoint("model"), bare, decoder_blocks(bare)[0])


def pruned(model: nn.Module, method: str, ids: Tensor, left: int, batch_size: int = 2):
    spec = MethodSpec(method)
    pruner = NeuronPruner(runner_of(model), spec, layout_of(model), left, dist=ALONE)
    return pruner.run(ids if spec.cls.observes else None, batch_size)


@torch.no_grad()
def by_hooks(model: nn.Module, method: str, ids: Tensor, left: int) -> list[list[int]]:
    """Neurons that stay, block after block, by whole forward passes; `model` keeps its shapes.

    A removed neuron is one that down ignores. For wanda and sparsegpt.
    """
    stay = []
    for block, mlp in zip(decoder_blocks(model)[1], layout_of(model).blocks, strict=True):
        down, seen = block.get_submodule(mlp.down), []
        handle = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for window in ids:
            model(input_ids=window[None], use_cache=False)
        handle.remove()
        x = torch.cat([one.flatten(0, -2) for one in seen]).double()
        weight = down.weight.data if isinstance(down, Conv1D) else down.weight.data.T  # (in, out)
        if method == "wanda":
            score = weight.double().norm(dim=1) * x.norm(dim=0)
            kept = score.argsort()[len(score) - left :].sort().values
            solution = weight.double()[kept]
        else:
            hessian = x.T @ x
            hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
            solution, inverse = weight.double().clone(), torch.linalg.inv(hessian)
            alive = list(range(len(hessian)))
            while len(alive) > left:
                score = solution.square().sum(1) / inverse.diagonal()
                lowest = sorted(alive, key=lambda row: score[row].item())
                gone = sorted(lowest[: min(16, len(alive) - left)])
                alive = [row for row in alive if row not in gone]
                rest = torch.tensor(alive)
                inner = torch.linalg.inv(hessian[rest[:, None], rest])
                solution, inverse = torch.zeros_like(solution), torch.eye(len(hessian)).double()
                target = hessian @ weight.double()
                solution[rest], inverse[rest[:, None], rest] = inner @ target[rest], inner
            kept = torch.tensor(alive)
            solution = solution[kept]
        weight.zero_()[kept] = solution.float()
        stay.append(kept.tolist())
    return stay


@torch.no_grad()
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", NAMES)
def test_as_whole_passes_with_hooks(name: str, method: str) -> None:
    model, ids = tiny.ALL[name](), windows(6)
    reference = copy.deepcopy(model)
    left = layout_of(model).width - 20
    done = pruned(model, method, ids, left)
    assert done.kept == by_hooks(reference, method, ids, left)
    out = model(input_ids=ids, use_cache=False).logits
    expected = reference(input_ids=ids, use_cache=False).logits
    assert torch.allclose(out, expected, atol=2e-3 * expected.abs().max().item())
    assert done.weights_after < done.weights_before


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_repair_comes_nearer_to_the_dense_model(name: str) -> None:
    ids, errors = windows(24), {}
    dense = tiny.ALL[name]()(input_ids=ids, use_cache=False).logits
    for method in METHODS:
        model = tiny.ALL[name]()
        pruned(model, method, ids, layout_of(model).width // 2, batch_size=8)
        out = model(input_ids=ids, use_cache=False).logits
        errors[method] = (out - dense).norm().item()
    assert errors["sparsegpt"] < errors["wanda"] and errors["sparsegpt"] < errors["magnitude"]
    assert errors["admm"] < errors["wanda"] and errors["admm"] < errors["magnitude"]


def test_batches_change_nothing_but_rounding() -> None:
    found = []
    for batch_size in (1, 6):
        model = tiny.tiny_llama()
        done = pruned(model, "sparsegpt", windows(6), 40, batch_size)
        found.append((done.kept, model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.allclose(tensor, found[1][1][name], atol=1e-3), name


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "left"),
    [(2048, 0.25, 64, 1536), (688, 0.25, 64, 512), (688, 0.25, 1, 516), (688, 0.99, 64, 64)],
)
def test_the_number_left_is_a_multiple(width: int, ratio: float, multiple: int, left: int) -> None:
    assert count_left(width, ratio, multiple) == left


def test_a_ratio_that_removes_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--neurons_multiple"):
        count_left(64, 0.25, 64)


def test_sets_of_neurons_as_text() -> None:
    for numbers, size in (({0, 5, 63}, 64), (set(), 3), ({2}, 3), (set(range(10)), 10)):
        text = to_hex(numbers, size)
        assert from_hex(text) == numbers and len(text) == -(-size // 4)
    with pytest.raises(ValueError):
        from_hex("xyz")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("Llama", "Gemma 3", "GPT-2", "Gemma 3 multimodal"):
        model = tiny.ALL[name](num_hidden_layers=3) if name == "Llama" else tiny.ALL[name]()
        tiny.write_model(folder / name, model)
    tiny.write_model(folder / "Mixtral", tiny.ALL["Mixtral"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


def flags(name: str, method: str, *more: object) -> list:
    base = ["--model", name, *QUICK, "--calibration_data", "uk", "--prune_method", method]
    return [*base, *NEURONS, *more]


def succeeded(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize(
    ("name", "method", "field", "left"),
    [
        ("Llama", "sparsegpt", "intermediate_size", 48),
        ("Gemma 3", "admm", "intermediate_size", 48),
        ("GPT-2", "wanda", "n_inner", 96),
        ("Gemma 3 multimodal", "magnitude", "intermediate_size", 48),
    ],
)
def test_a_run_saves_what_loads_anywhere(
    name: str, method: str, field: str, left: int, tmp_path: Path
) -> None:
    done = succeeded(call(*flags(name, method, "--save_model", tmp_path / "new")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    config = model.config.get_text_config()
    assert getattr(config, field) == left
    assert not {"auto_map", "quantization_config"} & model.config.to_dict().keys()  # as any other
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    found = results()
    neurons = found["neurons"]
    assert (neurons["after"], neurons["field"]) == (left, field)
    assert neurons["before"] == (128 if name == "GPT-2" else 64)
    for text in neurons["removed"]:
        assert len(from_hex(text)) == neurons["before"] - left
    assert f"removed {neurons['before'] - left} of {neurons['before']} neurons" in done.out
    assert f"{method}: {left} of {neurons['before']} neurons are left in each MLP" in done.out
    saved = sum(tensor.nbytes for tensor in weights(tmp_path / "new").values())
    assert saved == neurons["bytes_after"] < neurons["bytes_before"]
    card = (tmp_path / "new" / "README.md").read_text("utf-8")
    assert f"Each MLP has {left} of its {neurons['before']} neurons (`{field}`)" in card
    assert "neurons removed by " + method in card and "- sparse\n" not in card


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("method", ["admm", "magnitude"])
def test_offloaded_interrupted_and_by_several_processes_alike(
    method: str, place: Path, tmp_path: Path
) -> None:
    def folder(name: str) -> list:
        return ["--save", tmp_path / name / "out", "--save_model", tmp_path / name / "model"]

    succeeded(call(*flags("Llama", method, *folder("plain"))))
    expected = weights(tmp_path / "plain" / "model")
    away = tmp_path / "away"
    succeeded(call(*flags("Llama", method, *folder("offloaded"), "--offload", away)))
    resumed = flags("Llama", method, *folder("resumed"), "--resume", tmp_path / "kept")
    assert processes.run(resumed, place, "2:SIGKILL").status < 0
    assert len(list((tmp_path / "kept").glob("block-*.safetensors"))) == 2
    succeeded(call(*resumed))
    assert (
        results(tmp_path / "resumed" / "out")["neurons"]
        == (results(tmp_path / "plain" / "out")["neurons"])
    )
    for name in ("offloaded", "resumed"):
        found = weights(tmp_path / name / "model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    together = processes.together(2, [flags("Llama", method, *folder("two"))], place)
    assert [done.status for done in processes.ended(together)] == [0, 0]
    found = weights(tmp_path / "two" / "model")
    for key, tensor in expected.items():  # sums over processes round otherwise
        assert torch.allclose(found[key], tensor, atol=0.02), key


@pytest.mark.usefixtures("at_place")
def test_recovery_trains_all_of_the_smaller_model(tmp_path: Path) -> None:
    """At once, and by a second run, beside the dense model, whose blocks are larger."""
    options = ["--trim_vocabulary", "--recover", "512", "--recover_rate", "0.01"]
    done = succeeded(call(*flags("Llama", "wanda", *options, "--save_model", tmp_path / "both")))
    assert "recovery: training" in done.out
    before, after = results()["recovery"]["curve"][0], results()["recovery"]["kept"]
    assert after["perplexity"] < before["perplexity"]
    succeeded(call(*flags("Llama", "wanda", "--save_model", tmp_path / "small")))
    first = weights(tmp_path / "small")
    second = ["--model", tmp_path / "small", "--teacher", "Llama", *QUICK, *options[1:]]
    second += ["--calibration_data", "uk", "--save_model", tmp_path / "recovered"]
    succeeded(call(*second))
    assert results()["recovery"]["weights"] == sum(
        tensor.numel() for name, tensor in first.items() if ".layers." in name
    )
    changed = weights(tmp_path / "recovered")
    for name, tensor in first.items():
        assert (".layers." in name) != torch.equal(tensor, changed[name]), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")


@pytest.mark.usefixtures("at_place")
def test_the_smaller_model_is_packed_by_a_second_run(tmp_path: Path) -> None:
    succeeded(call(*flags("Llama", "wanda", "--save_model", tmp_path / "small")))
    second = ["--model", tmp_path / "small", "--prune_method", "magnitude", *QUICK]
    second += ["--eval_data", "uk", "--replace_sparse_layers", "--save_model", tmp_path / "packed"]
    succeeded(call(*second))
    assert results()["sparsity"]["overall"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--model", "Mixtral"], "--sparsity_type neurons: --model Mixtral: its MLPs are experts"),
        (["--replace_sparse_layers"], "leaves no zeros for --replace_sparse_layers"),
        (["--load_bit", "4"], "leave out --load_bit 4"),
        (["--allocation", "error"], "--allocation error: is for --sparsity_type unstructured"),
        (["--sparsity_ratio", "0"], "--sparsity_ratio 0: with --sparsity_type neurons"),
        (["--neurons_multiple", "64"], "a smaller --neurons_multiple"),
        (["--neurons_multiple", "0"], "--neurons_multiple 0: must be at least 1"),
        (["--sparsity_type", "2:4", "--sparsity_ratio", "0.5"], "is for --sparsity_type neurons"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(more: list[str], named: str) -> None:
    done = call(*flags("Llama", "wanda", *more))
    assert done.status == 2 or done.status == 1
    [line] = done.complaints
    assert named in line


@pytest.mark.usefixtures("at_place")
def test_languages_compares_the_neurons_of_two_texts(tmp_path: Path) -> None:
    tiny.write_texts("en", tiny.sentences(20, seed=5), 3)
    out = tmp_path / "languages"
    argv = ["Llama", "uk", "en", "--type", "neurons", "--ratio", "0.25", "--out", str(out), "--"]
    languages.main([*argv, *QUICK, "--neurons_multiple", "16", "--prompts", "0"])
    found = json.loads((out / "overlap" / "overlap.json").read_text("utf-8"))
    assert found["blocks"].keys() == {"0", "1", "2"}
    assert all(cell["weights"] == 64 for cell in found["blocks"].values())


@pytest.mark.usefixtures("at_place")
def test_results_are_plain_json_of_moderate_size(tmp_path: Path) -> None:
    succeeded(call(*flags("Llama", "magnitude", "--save", tmp_path)))
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [len(text) for text in found["neurons"]["removed"]] == [16] * 3
