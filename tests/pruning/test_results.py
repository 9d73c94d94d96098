"""What is known of a pruned model: errors of its layers' outputs, masks; `prune` in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, prune_, results, runner_of, succeed, weights, windows
from torch import Tensor

from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.prune import prune
from lib.pruning import errors
from lib.pruning.check import SparsityCheck
from lib.pruning.errors import TokenSample, relative_error
from lib.pruning.masks import packed_masks, read_masks, unpacked, write_masks
from lib.util.errors import UserError


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


def estimate(rows: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return relative_error(rows @ weight.T, rows @ pruned.T)


def sampled(x: Tensor, batch: int) -> TokenSample:
    sample = TokenSample()
    for part in x.split(batch):
        sample.add(part)
    return sample


def test_few_tokens_give_the_error_itself() -> None:
    x, weight, pruned = layer(errors.TOKENS)
    for batch in (10, errors.TOKENS):
        found = estimate(sampled(x, batch).rows(), weight, pruned)
        assert found == pytest.approx(exact(x, weight, pruned), rel=1e-4)


def test_of_many_it_is_near_whatever_the_batch() -> None:
    ratios = []
    for seed in range(8):
        x, weight, pruned = layer(5000, seed)
        samples = [sampled(x, batch) for batch in (5000, 700, 130)]
        rows = [sample.rows() for sample in samples]
        assert all(torch.equal(one, rows[0]) for one in rows)
        ratios.append(estimate(rows[0], weight, pruned) / exact(x, weight, pruned))
    assert all(0.75 < ratio < 1.3 for ratio in ratios)
    assert sum(ratios) / 8 == pytest.approx(1, abs=0.1)


def test_sums_of_squares_are_unbiased() -> None:
    """Over samples that start elsewhere, of inputs of which one token has half of the squares."""
    x, _, _ = layer(3000)
    x[1234] *= x.norm() / x[1234].norm()
    estimates = []
    for start in range(40):
        sample = TokenSample()
        sample.seen = 1000 * start
        sample.add(x)
        estimates.append(float(sample.rows().square().sum()))
    assert sum(estimates) / 40 == pytest.approx(float(x.square().sum()), rel=0.02)


def test_the_errors_of_a_model_are_those_by_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all tokens; the inputs of the first block's first layers are those of the dense model."""
    monkeypatch.setattr(errors, "TOKENS", 10_000)
    monkeypatch.setattr("lib.pruning.inputs.TOKENS", 10_000)
    model, ids = tiny.tiny_llama().requires_grad_(False), windows(6)
    dense, seen = copy.deepcopy(model), []
    for method in ("wanda", "sparsegpt", "admm"):
        ours = copy.deepcopy(model)
        done = prune(ours, ids, method, "2:4", batch_size=4)
        first = dense.model.layers[0].self_attn
        with first.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            dense(input_ids=ids)
        for path in ("q_proj", "k_proj", "v_proj"):
            before, after = (
                each.model.layers[0].self_attn.get_submodule(path).weight for each in (dense, ours)
            )
            found = done.errors[f"model.layers.0.self_attn.{path}"]
            assert found == pytest.approx(exact(seen[-1].flatten(0, 1), before, after), rel=1e-3)
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
    odd = {"a": ((3, 5), packed_masks_of(torch.eye(3, 5).bool()))}
    write_masks(tmp_path / "odd", odd)
    assert torch.equal(read_masks(tmp_path / "odd")["a"], torch.eye(3, 5).bool())
    assert torch.equal(unpacked(odd)["a"], torch.eye(3, 5).bool())
    Path(tmp_path / "text").write_text("no")
    for wrong in ("text", "none"):
        with pytest.raises(UserError, match=f"{wrong}: --save_masks did not write it"):
            read_masks(tmp_path / wrong)


def packed_masks_of(mask: Tensor) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.packbits(mask.numpy()))


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
    done = call(*run, "wanda", "--save_masks", "folder")
    assert done.status == 1 and "--save_masks folder: it is a folder" in done.complaints[0]
    done = call(*run, "wanda", "--save_masks", "x", "--sparsity_type", "neurons")
    assert done.status == 2 and "leaves no zeros" in done.complaints[0]


def test_lost_zeros_are_told_to_the_user() -> None:
    runner = runner_of(tiny.tiny_llama().requires_grad_(False))
    prune_(runner, "magnitude", Sparsity(0.5, 2, 4))
    sparsity = SparsityCheck(runner)
    runner.model.model.layers[0].mlp.up_proj.weight.data[0] = 1
    with pytest.raises(UserError, match="model.layers.0.mlp.up_proj: it has lost 16 zeros"):
        sparsity.recheck(runner)


# --- in memory


def test_prune_in_memory_is_what_a_run_does() -> None:
    ids = windows(6)
    ours, theirs = tiny.tiny_llama(), tiny.tiny_llama()
    ours.train()
    done = prune(ours, ids, "wanda", "2:4")
    prune_(theirs, "wanda", Sparsity(0.5, 2, 4), ids)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    assert ours.training and all(p.requires_grad for p in ours.parameters())
    assert done.sparsity == 0.5 and done.notes == [] and set(done.shares.values()) == {0.5}
    weight = ours.get_submodule(name := "model.layers.1.mlp.down_proj").weight
    assert torch.equal(done.masks[name], weight == 0) and done.masks[name].dtype == torch.bool
    again = prune(tiny.tiny_llama(), ids, Wanda, 0.5, allocation="error", seed=1)
    assert len(set(again.shares.values())) > 1
    assert again.sparsity == pytest.approx(0.5, abs=0.03)  # rounded in each row


def test_prune_reads_texts() -> None:
    tokenizer, texts = tiny.tiny_tokenizer(), tiny.sentences(20)
    found = []
    for seed in (0, 0, 1):
        model = tiny.tiny_llama()
        prune(model, texts, tokenizer=tokenizer, nsamples=8, seqlen=32, seed=seed)
        found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for words, options in (
        ("tokenizer: texts require one", {}),
        ("too few for nsamples 128 windows", dict(tokenizer=tokenizer, seqlen=64)),
    ):
        with pytest.raises(UserError, match=words):
            prune(tiny.tiny_llama(), texts, **options)
    with pytest.raises(UserError, match="Wanda needs windows or texts"):
        prune(tiny.tiny_llama())
    with pytest.raises(ValueError, match="Give one, or 2:4 or 4:8"):
        prune(tiny.tiny_llama(), windows(2), sparsity="3:4")
