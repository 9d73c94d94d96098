"""--rounding through main.py: what it gives, when it is done, and that nothing of it gets lost."""

from __future__ import annotations

import signal
from pathlib import Path

import processes
import pytest
import tiny
import torch
from support import QUICK, call, results, weights

from lib.packed.layout import Packed, unpack
from lib.round import Rounder

TEXTS = ["--calibration_data", "uk", "--eval_data", "uk"]
WANDA = ["--prune_method", "wanda"]
PACK = ["--replace_sparse_layers", "--pack_bits"]
BLOCKS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", 40, 8)
    tiny.write_texts(folder / "more", 200, 100)
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=BLOCKS).bfloat16())
    tiny.write_model(folder / "tied", tiny.HYBRIDS["Zamba2"]())
    tiny.write_model(folder / "experts", tiny.ARCHITECTURES["Mixtral"]())
    return folder


pytestmark = pytest.mark.usefixtures("at_place")


def run(model: Path | str, *flags: object, to: Path, saved: bool = True):
    target = ["--save_model", to / "model"] if saved else []
    done = call("--model", model, *QUICK, *TEXTS, *flags, "--save", to / "out", *target)
    assert done.status == 0, done.err
    return done


def perplexity(folder: Path) -> float:
    return results(folder / "out")["perplexity"]["uk"]


def same_weights(one: Path, two: Path) -> bool:
    first, second = weights(one / "model"), weights(two / "model")
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_a_trained_model_stays_far_nearer_to_what_it_is_at_16_bits(
    method: str, trained: Path, tmp_path: Path
) -> None:
    """By divergence: perplexity of so small a model also falls where weights move by chance."""
    texts = ["--calibration_data", "more", "--eval_data", "more", "--prompts", 0]
    pruned, kl = tmp_path / "pruned/model", {}
    run(trained, "--prune_method", method, *texts, "--nsamples", 200, to=pruned.parent)
    for kind in ("hessian", "nearest"):
        how = ["--rounding", kind] if kind == "hessian" else ["--eval_only"]
        run(pruned, *PACK, 4, *how, *texts, "--nsamples", 200, to=tmp_path / kind)
        beside = ["--eval_only", "--teacher", pruned, *texts]
        run(tmp_path / kind / "model", *beside, to=tmp_path / kind, saved=False)
        [test] = results(tmp_path / kind / "out")["evaluation"]
        kl[kind] = test["kl"]
    assert kl["hessian"] < 0.7 * kl["nearest"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]])
def test_what_was_measured_is_what_is_saved(bits: int, flags: list[str], tmp_path: Path) -> None:
    done = run("model", *WANDA, *PACK, bits, *flags, to=tmp_path / "new")
    assert f"rounded {7 * BLOCKS} linears to {bits} bits, column by column" in done.out
    record = results(tmp_path / "new/out")
    assert record["packed"]["bits"] == bits and 0 < record["packed"]["difference"] < 0.5
    assert record["seconds"]["round"] > 0 and record["calibration"]["windows"] == 8
    assert record["sparsity"]["overall"] >= 0.5
    run(tmp_path / "new/model", "--eval_only", *flags, to=tmp_path / "again", saved=False)
    assert perplexity(tmp_path / "again") == pytest.approx(perplexity(tmp_path / "new"), rel=1e-5)


@pytest.mark.parametrize("model", ["model", "tied", "experts"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_was_pruned_before_is_rounded_the_same_way(
    model: str, bits: int, tmp_path: Path
) -> None:
    run(model, *WANDA, to=tmp_path / "pruned")
    run(model, *WANDA, *PACK, bits, to=tmp_path / "once")
    run(tmp_path / "pruned/model", *PACK, bits, to=tmp_path / "later")
    assert same_weights(tmp_path / "once", tmp_path / "later")
    record = results(tmp_path / "later/out")
    assert record["method"] == "pruned before" and record["calibration"]["windows"] == 8


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_is_each_weight_by_itself(bits: int, tmp_path: Path) -> None:
    """By flag, with --eval_only, and where no text is there to be read."""
    run("model", *WANDA, to=tmp_path / "pruned")
    run("model", *WANDA, *PACK, bits, "--rounding", "nearest", to=tmp_path / "nearest")
    run(tmp_path / "pruned/model", "--eval_only", *PACK, bits, to=tmp_path / "later")
    assert same_weights(tmp_path / "nearest", tmp_path / "later")
    assert "round" not in results(tmp_path / "later/out")["seconds"]
    magnitude = ["--model", "model", *QUICK, "--eval_data", "uk", "--prune_method", "magnitude"]
    done = call(*magnitude, *PACK, bits, "--save", tmp_path / "magnitude")
    assert done.status == 0 and results(tmp_path / "magnitude")["calibration"] is None
    done = call(*magnitude, *PACK, bits, "--calibration_data", "uk", "--save", tmp_path / "text")
    assert done.status == 0 and results(tmp_path / "text")["seconds"]["round"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rounding", "nearest"], ["--rounding nearest", "--pack_bits"]),
        ([*PACK, 16, "--rounding", "hessian"], ["--rounding hessian", "--pack_bits"]),
        ([*PACK, 4, "--rounding", "hessian", "--recover", 99], ["--recover 99", "--rounding"]),
    ],
)
def test_refused_beside_other_flags(flags: list[object], words: list[str]) -> None:
    done = call("--model", "model", *QUICK, *TEXTS, *WANDA, *flags)
    assert done.status == 2 and all(word in done.complaints[-1] for word in words)


def test_refused_without_reading_a_weight(tmp_path: Path) -> None:
    argv = ["--model", "model", *QUICK, *TEXTS, *PACK, 4]
    done = call(*argv, "--eval_only", "--rounding", "hessian")
    assert done.status == 2 and "leave out --eval_only" in done.complaints[-1]
    done = call("--model", "model", *QUICK, "--eval_data", "uk", *PACK, 4)
    assert done.status == 2 and "--prune_method: name one of" in done.complaints[-1]
    run("model", *WANDA, PACK[0], to=tmp_path / "packed")
    done = call("--model", tmp_path / "packed/model", *QUICK, *TEXTS, *PACK, 4)
    assert done.status == 1 and "which --rounding can't work on" in done.complaints[-1]
    assert "unpack" in done.complaints[-1]


def test_refused_before_anything_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounder, "_block_", lambda *_: pytest.fail("the pass has begun"))
    done = call("--model", "model", *QUICK, *TEXTS, *PACK, 4)
    assert done.status == 1
    assert "no linear is smaller packed; prune with --prune_method first" in done.complaints[-1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kept", [[], ["--offload", "away"]])
def test_killed_twice_and_the_same_bytes(bits: int, kept: list[str], tmp_path: Path) -> None:
    flags = ["--prune_method", "admm", *PACK, bits]
    run("model", *flags, to=tmp_path / "whole")
    argv = ["--model", "model", *QUICK, *TEXTS, *flags, *kept, "--resume", tmp_path / "kept"]
    argv += ["--save", tmp_path / "out", "--save_model", tmp_path / "again/model"]
    for fault, shards in (("2:SIGKILL", 2), ("round 2:SIGKILL", BLOCKS + 2)):
        assert processes.run(argv, Path.cwd(), fault).status == -signal.SIGKILL
        assert len(list((tmp_path / "kept").glob("*.safetensors"))) == shards
    done = call(*argv)
    assert done.status == 0, done.err
    assert same_weights(tmp_path / "whole", tmp_path / "again")
    assert not (tmp_path / "kept").exists() and not Path("away").exists()


def test_a_model_pruned_before_is_resumed_too(tmp_path: Path) -> None:
    run("model", *WANDA, to=tmp_path / "pruned")
    model = tmp_path / "pruned/model"
    run(model, *PACK, 4, to=tmp_path / "whole")
    argv = ["--model", model, *QUICK, *TEXTS, *PACK, 4, "--resume", tmp_path / "kept"]
    argv += ["--save", tmp_path / "out", "--save_model", tmp_path / "again/model"]
    assert processes.run(argv, Path.cwd(), "round 1:SIGKILL").status == -signal.SIGKILL
    names = [path.name for path in (tmp_path / "kept").glob("*.safetensors")]
    assert names == ["rounded-00000.safetensors"]
    done = call(*argv)
    assert done.status == 0, done.err
    assert same_weights(tmp_path / "whole", tmp_path / "again")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_two_processes_round_as_one(bits: int, tmp_path: Path) -> None:
    run("model", *WANDA, *PACK, bits, to=tmp_path / "alone")
    argv = ["--model", "model", *QUICK, *TEXTS, *WANDA, *PACK, bits]
    argv += ["--save", tmp_path / "shared/out", "--save_model", tmp_path / "shared/model"]
    ended = processes.ended(processes.together(2, [argv], Path.cwd()))
    assert [one.status for one in ended] == [0, 0], ended[0].err
    one, two = perplexity(tmp_path / "alone"), perplexity(tmp_path / "shared")
    assert two == pytest.approx(one, rel=5e-3)
    first, second = (linear(tmp_path / name) for name in ("alone", "shared"))
    assert torch.isclose(first, second, rtol=1e-3).float().mean() > 0.9
    run(tmp_path / "shared/model", "--eval_only", to=tmp_path / "again", saved=False)
    assert perplexity(tmp_path / "again") == pytest.approx(two, rel=1e-5)


def linear(folder: Path) -> torch.Tensor:
    """The dense weight of one packed linear."""
    tensors, name = weights(folder / "model"), "model.layers.0.mlp.up_proj"
    packed = Packed(*(tensors[f"{name}.{part}"] for part in Packed._fields))
    return unpack(packed, 32)
