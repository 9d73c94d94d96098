"""What pruning reports and keeps: warnings, errors of layers, masks; in memory; few tokens."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import disk_offload
from support import (
    CPU,
    HALF,
    QUICK,
    call,
    loaded,
    prune_,
    refused,
    results,
    runner_of,
    succeed,
    weights,
    windows,
)
from torch import Tensor, nn

from lib.calibration import output_error
from lib.calibration.inputs import weight_key
from lib.calibration.output_error import TokenSample, relative_error
from lib.data.windows import WindowSpec
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.masks import packed_masks, read_masks, unpacked, write_masks
from lib.model.sparsity_check import SparsityCheck
from lib.model.store import BlockStore
from lib.prune import prune, windows_of_texts
from lib.util.errors import RunWarning
from lib.util.resume import RunFolder

TWO_OF_FOUR = Sparsity(0.5, 2, 4)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_finished_blocks_keep_what_they_reported(method: str, tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "blocks")
    folder.begin({})
    found = []
    for _ in range(2):  # the second run finds the first block finished
        model = tiny.ARCHITECTURES["Mixtral"]()
        runner = BlockRunner(model, CPU, BlockStore(model, CPU, finished=folder))
        done = prune_(runner, method, ids=windows(2, 8))
        found.append((done.summary(), model.state_dict()))
        (tmp_path / "blocks" / "block-00001.safetensors").unlink()
    folder.close()
    assert any("too few tokens were routed" in line for line in found[0][0])
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_whose_a_warning_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Wanda.prune_

    def warning(self, weights, *rest) -> None:
        if len(weights) == 3:  # q, k and v
            warnings.warn("a kernel is missing", RunWarning, stacklevel=2)
            warnings.warn("is singular", stacklevel=2)
        own(self, weights, *rest)

    monkeypatch.setattr(Wanda, "prune_", warning)
    done = prune_(tiny.tiny_llama(num_hidden_layers=1), "wanda", HALF)
    names = ", ".join(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert done.summary()[1:] == ["a kernel is missing", f"{names}: is singular"]


def test_a_weight_that_blocks_share_is_pruned_once() -> None:
    runner = runner_of(tiny.ALL["Zamba2"]())
    done = prune_(runner, "magnitude").pruned
    keys = [weight_key(one) for one in runner.each_linear() if one.name in done]
    assert len({*keys}) == len(keys) == len(done)


def test_what_falls_short_or_loses_zeros_is_named() -> None:
    runner = runner_of(tiny.tiny_llama())
    done = prune_(runner, "magnitude", TWO_OF_FOUR)
    name = "model.layers.1.mlp.up_proj"
    target = dict.fromkeys(done.pruned, TWO_OF_FOUR)
    assert SparsityCheck(runner, target).overall == 0.5
    weight = runner.model.get_submodule(name).weight.data
    weight[0, :4] = 1
    assert f"{name}: 1 of 512 groups" in refused(SparsityCheck, runner, target)
    weight[:8] = 1
    assert f"{name}: only 0.4375" in refused(
        SparsityCheck, runner, dict.fromkeys(done.pruned, HALF)
    )
    SparsityCheck(runner, target, [name])  # left dense: only counted
    measured = SparsityCheck(runner, target, done.pruned)
    runner.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.fill_(1)
    assert "model.layers.0.mlp.up_proj: it has lost 1024 zeros" in refused(measured.recheck, runner)


# --- experts that few tokens, or none, are routed to

FIRST = "model.layers.0.mlp.experts"


def mixtral(chosen: list[int]) -> nn.Module:
    """A Mixtral in whose first block every token is routed to two of the experts `chosen`."""
    model = tiny.ARCHITECTURES["Mixtral"]()

    def route(_, args: tuple) -> tuple:
        hidden, index, weights = args
        pair = torch.tensor(chosen)[torch.arange(2 * len(index)).view(-1, 2) % len(chosen)]
        return hidden, pair.to(index.dtype), weights

    model.get_submodule(FIRST).register_forward_pre_hook(route)
    return model


def experts_of(model: nn.Module, method: str, ids: Tensor) -> tuple[Tensor, list[str]]:
    """The first block's gate and up matrices (experts, ., .), and the summary's lines.

    Their inputs are those of all methods: what comes before is dense.
    """
    model = copy.deepcopy(model)
    done = prune_(model, method, ids=ids)
    return model.get_submodule(FIRST).gate_up_proj, done.summary()


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_few_tokens_fall_back_to_wanda_and_none_to_magnitude(method: str) -> None:
    model = mixtral([0, 1, 2])
    ids = windows(3, 8)  # 24 tokens, 16 for each of three experts: fewer than their 32 inputs
    ours, lines = experts_of(model, method, ids)
    wanda, _ = experts_of(model, "wanda", ids)
    magnitude, _ = experts_of(model, "magnitude", ids)
    if method == "sparsegpt":  # admm observes after it has pruned the attention
        assert torch.equal(ours[:3], wanda[:3])
    assert torch.equal(ours[3], magnitude[3])
    assert not torch.equal(wanda[0], magnitude[0])
    for fallback, expert in (("wanda", 0), ("magnitude", 3)):
        [line] = [one for one in lines if one.startswith(f"pruned by {fallback}, too few tokens")]
        assert f"{FIRST}.gate_up_proj.{expert}" in line


def test_experts_with_enough_tokens_are_pruned_by_the_method_itself() -> None:
    model, ids = mixtral([0, 1, 2, 3]), windows(12, 24)  # 144 tokens for each expert
    ours, lines = experts_of(model, "sparsegpt", ids)
    wanda, _ = experts_of(model, "wanda", ids)
    assert not torch.equal(ours[0], wanda[0])
    assert not any("too few tokens" in line and f"{FIRST}." in line for line in lines)
    model = tiny.ARCHITECTURES["Mixtral"]()  # none at all, as where a router's weights are broken
    model.get_submodule(FIRST).forward = lambda hidden, *_: torch.zeros_like(hidden)
    assert "--nsamples" in refused(prune_, model, "wanda", ids=windows(2, 8))


# --- errors of the layers' outputs


def exact(x: Tensor, weight: Tensor, pruned: Tensor) -> float:
    x = x.double()
    change, before = x @ (weight - pruned).double().T, x @ weight.double().T
    return float(change.square().sum() / before.square().sum())


def layer(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of which every hundredth token is large, a weight, and that pruned at random."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    x[::100] *= 50
    weight = torch.randn(16, 24, generator=draw)
    return x, weight, weight * (torch.rand(16, 24, generator=draw) > 0.5)


def sampled(x: Tensor, batch: int, start: int = 0) -> Tensor:
    sample = TokenSample()
    sample.seen = start
    for part in x.split(batch):
        sample.add(part)
    return sample.rows()


def test_a_sample_of_tokens_tells_the_error_whatever_the_batch() -> None:
    def estimate(rows: Tensor) -> float:
        return relative_error(rows @ weight.T, rows @ pruned.T)

    x, weight, pruned = layer(output_error.TOKENS)
    for batch in (10, output_error.TOKENS):  # few tokens: the error itself
        found = estimate(sampled(x, batch))
        assert found == pytest.approx(exact(x, weight, pruned), rel=1e-4)
    ratios = []
    for seed in range(8):
        x, weight, pruned = layer(5000, seed)
        rows = [sampled(x, batch) for batch in (5000, 700, 130)]
        assert all(torch.equal(one, rows[0]) for one in rows)
        ratios.append(estimate(rows[0]) / exact(x, weight, pruned))
    assert all(0.75 < ratio < 1.3 for ratio in ratios)
    assert sum(ratios) / 8 == pytest.approx(1, abs=0.1)
    x = layer(3000)[0]  # unbiased also where one token has half of the squares
    x[1234] *= x.norm() / x[1234].norm()
    sums = [float(sampled(x, 3000, 1000 * start).square().sum()) for start in range(40)]
    assert sum(sums) / 40 == pytest.approx(float(x.square().sum()), rel=0.02)


def test_the_errors_of_a_model_are_those_by_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all tokens; the inputs of the first block's first layers are those of the dense model."""
    monkeypatch.setattr(output_error, "TOKENS", 10_000)
    monkeypatch.setattr("lib.calibration.inputs.TOKENS", 10_000)
    dense, ids, seen = tiny.tiny_llama().requires_grad_(False), windows(6), []
    first = dense.model.layers[0].self_attn
    with first.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        dense(input_ids=ids)
    for method in ("wanda", "sparsegpt", "admm"):
        ours = copy.deepcopy(dense)
        done = prune(ours, ids, method, "2:4", batch_size=4)
        for path in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.0.self_attn.{path}"
            before, after = (each.get_submodule(name).weight for each in (dense, ours))
            expected = exact(seen[0].flatten(0, 1), before, after)
            assert done.errors[name] == pytest.approx(expected, rel=1e-3)
        assert len(done.errors) == 14


# --- masks


def test_masks_come_back_from_a_file(tmp_path: Path) -> None:
    """With rows that are no multiple of 8, transposed weights and experts."""
    for name in ("Llama", "GPT-2", "Mixtral"):
        runner = runner_of(tiny.ALL[name]().requires_grad_(False))
        done = prune_(runner, "magnitude", Sparsity(0.3))
        file = tmp_path / "new" / f"{name}.safetensors"
        write_masks(file, packed_masks(runner, done.pruned))
        masks = read_masks(file)
        assert masks.keys() == done.pruned.keys()
        for linear in runner.each_linear():
            assert torch.equal(masks[linear.name], linear.matrix() == 0)
        assert [each.name for each in file.parent.glob(f"*{name}*")] == [file.name]
    odd = {"a": ((3, 5), torch.from_numpy(np.packbits(torch.eye(3, 5).bool().numpy())))}
    write_masks(tmp_path / "odd", odd)
    assert torch.equal(read_masks(tmp_path / "odd")["a"], torch.eye(3, 5).bool())
    assert torch.equal(unpacked(odd)["a"], torch.eye(3, 5).bool())
    (tmp_path / "text").write_text("no")
    for wrong in ("text", "none"):
        assert f"{wrong}: " in refused(read_masks, tmp_path / wrong)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_keeps_masks_and_errors() -> None:
    tiny.write_model("model")
    tiny.write_texts("uk")
    run = ["--model", "model", "--calibration_data", "uk", *QUICK, "--prune_method"]
    kept = ["--save_masks", "kept/masks.safetensors", "--save_model", "new"]
    succeed(*run, "sparsegpt", "--sparsity_type", "2:4", *kept)
    masks, tensors = read_masks("kept/masks.safetensors"), weights("new")
    assert len(masks) == 14
    assert all(torch.equal(mask, tensors[f"{name}.weight"] == 0) for name, mask in masks.items())
    [folder] = Path("out").iterdir()
    found = results(folder)["errors"]
    assert found.keys() == masks.keys() and all(0 < error < 1 for error in found.values())
    succeed(*run, "magnitude", "--save", "magnitude")
    assert "errors" not in results("magnitude")  # it reads no text
    Path("folder").mkdir()
    for status, flags in (
        (1, ["--save_masks", "folder"]),
        (2, ["--save_masks", "x", "--sparsity_type", "neurons"]),
    ):
        done = call(*run, "wanda", *flags)
        assert done.status == status and "--save_masks" in done.complaints[0]


# --- in memory


def test_prune_in_memory_is_what_a_run_does() -> None:
    ids = windows(6)
    ours, theirs = tiny.tiny_llama(), tiny.tiny_llama()
    ours.train()
    done = prune(ours, ids, "wanda", "2:4")
    prune_(theirs, "wanda", TWO_OF_FOUR, ids)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert ours.training and all(p.requires_grad for p in ours.parameters())
    assert done.sparsity == 0.5 and done.notes == [] and set(done.shares.values()) == {0.5}
    weight = ours.get_submodule(name := "model.layers.1.mlp.down_proj").weight
    assert torch.equal(done.masks[name], weight == 0) and done.masks[name].dtype == torch.bool
    again = prune(tiny.tiny_llama(), ids, Wanda, 0.5, allocation="error", seed=1)
    assert len(set(again.shares.values())) > 1
    assert again.sparsity == pytest.approx(0.5, abs=0.03)  # rounded in each row


@pytest.mark.usefixtures("elsewhere")
def test_prune_reads_texts_as_a_run_does() -> None:
    """Each gives at most one window, or windows are anywhere in their whole if they are short."""
    tokenizer, texts = tiny.tiny_tokenizer(), tiny.sentences(20, words=16)
    tiny.write_model("model", tokenizer=tokenizer)
    tiny.write_texts("uk", texts)
    run = ["--model", "model", "--calibration_data", "uk", "--prune_method", "wanda", *QUICK]
    for seqlen in (16, 120):
        given = ["--seqlen", seqlen, "--save_masks", f"{seqlen}", "--seed", 1, "--bos", "never"]
        succeed(*run, *given, "--save", f"out-{seqlen}")
        model, masks = loaded("model"), read_masks(f"{seqlen}")
        given = dict(tokenizer=tokenizer, nsamples=8, seqlen=seqlen)
        done = prune(model, texts, seed=1, **given)
        assert all(torch.equal(masks[name], mask) for name, mask in done.masks.items())
        assert any("are joined" in note for note in done.notes) == (seqlen == 120)
        other = prune(loaded("model"), texts, seed=2, **given)
        assert not all(torch.equal(masks[name], mask) for name, mask in other.masks.items())
    notes: list[str] = []
    spec = WindowSpec(tokenizer, 512)
    ids = windows_of_texts(tiny.sentences(4, words=90), spec, 4, shortens=True, say=notes.append)
    assert ids.shape == (4, 256) and notes[0].startswith("window: 256 tokens, ")
    assert "; seqlen sets another" in notes[0]
    model = tiny.tiny_llama()
    assert "tokenizer: " in refused(prune, model, texts)
    line = refused(prune, model, texts[:2], tokenizer=tokenizer, seqlen=64)
    assert line.startswith("calibration texts: ") and "128 windows of 64" in line
    assert re.search(r"Give more text, nsamples \d+ or seqlen \d+\.", line)
    assert "Wanda" in refused(prune, model)


@pytest.mark.usefixtures("elsewhere")
def test_mistakes_name_the_argument_and_change_nothing() -> None:
    model, ids = tiny.tiny_llama(), windows(2)
    for options, said in (
        ({"sparsity": "3:4"}, "2:4 or 4:8"),
        ({"sparsity": 1.5}, "sparsity 1.5: "),
        ({"sparsity": 0.5, "method": "frequency"}, "sparsity unstructured: "),
        ({"method_args": {"alpha": 1}}, "method_args alpha=1: "),
        ({"allocation": "none.json"}, "allocation none.json: "),
        ({"method": "mine.py:Mine"}, "method mine.py:Mine: "),
    ):
        line = refused(prune, model, ids, **options)
        assert said in line and "--" not in line
    for wrong in ("a text", ids[0], ids.float(), ids[:0]):
        assert refused(prune, model, wrong).startswith("calibration: ")
    disk_offload(model, "away", execution_device=torch.device("cpu"))
    assert "meta" in refused(prune, model, ids)
    model = tiny.tiny_llama()
    model.model.layers[1].to("meta")  # as on a second device
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    assert "on cpu and meta" in refused(prune, model, ids)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
