"""`--recover` as a user gives it: results, refusals, interruptions, several processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, Done, call, results, succeed, weights
from transformers import AutoModelForCausalLM

from lib.model import reference
from lib.packed.formats import IQ4_NL, Q4_0
from lib.packed.linear import SparseLinear

STEPS = 8
TOKENS = STEPS * 256 + 9
BASE = ["--model", "model", *QUICK, "--calibration_data", "uk", "--eval_data", "uk"]
RECOVER = ["--recover", TOKENS, "--recover_lr", "0.01"]
PRUNE = ["--prune_method", "wanda", "--sparsity_type", "2:4"]
PACK = ["--replace_sparse_layers", "--quantize", "int4"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama().bfloat16())
    tiny.write_model(folder / "other", tiny.tiny_llama(intermediate_size=48))
    few = tiny.tiny_tokenizer(add_bos=False)
    few.add_tokens(["unheard"])
    tiny.write_model(folder / "foreign", tokenizer=few)
    tiny.write_texts(folder / "uk", train=200, test=4)
    tiny.write_texts(folder / "short", train=["one two"] * 5, test=4)
    lines = (folder / "uk/test.jsonl").read_text("utf-8").splitlines()
    same = [json.loads(line)["text"] for line in lines]
    tiny.write_texts(folder / "seen", train=same, test=same)
    return folder


def run(folder: Path, *argv: object) -> tuple[Done, dict]:
    """A run that succeeds, with its results and its model in a folder."""
    done = succeed(*BASE, *argv, "--save", folder / "out", "--save_model", folder / "model")
    return done, results(folder / "out")


def evaluated(model: Path, *argv: object) -> float:
    """Perplexity of a model that was saved."""
    argv = ("--eval_data", "uk", *argv, "--save", model.parent / "evaluated")
    succeed("--model", model, *QUICK, "--eval_only", *argv)
    return results(model.parent / "evaluated")["perplexity"]["uk"]


def held(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the linears of a packed model stand for, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    linears = {key: m for key, m in model.named_modules() if isinstance(m, SparseLinear)}
    return {key: module.dense(torch.float32) for key, module in linears.items()}


@pytest.fixture(scope="module")
def recovered(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with recovery."""
    folder = tmp_path_factory.mktemp("recovered")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        run(folder, *PRUNE, *RECOVER, "--recover_ce_weight", "0.3")
    return folder


def test_what_a_run_leaves(recovered: Path, tmp_path: Path) -> None:
    """It is measured as it is saved, has the zeros of pruning alone, and the norms have moved."""
    found = results(recovered / "out")
    recovery = found["recovery"]
    assert recovery["tokens"] == recovery["steps"] * recovery["windows"] * 32 <= TOKENS
    assert recovery["cross_entropy"] == 0.3 and recovery["rate"] == 0.01
    assert recovery["teacher"] == "model" and recovery["text"]["windows"] == STEPS * 8
    assert recovery["curve"][0]["tokens"] == 0 and len(recovery["curve"]) > 1
    assert set(recovery["before"]) == set(found["perplexity"]) == {"uk"}
    assert found["sparsity"]["overall"] == 0.5
    _, plain = run(tmp_path, *PRUNE)
    assert recovery["before"]["uk"]["perplexity"] == pytest.approx(
        plain["perplexity"]["uk"], rel=1e-6
    )
    before, after = weights(tmp_path / "model"), weights(recovered / "model")
    changed = 0
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        zero = tensor == 0
        assert torch.equal(after[name][zero], tensor[zero])
        changed += not torch.equal(after[name], tensor)
    assert changed == 2 * 9 and torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    measured = found["perplexity"]["uk"]
    assert evaluated(recovered / "model") == pytest.approx(measured, rel=1e-6)
    _, other = run(tmp_path / "ce", *PRUNE, *RECOVER, "--recover_ce_weight", "0")
    assert other["recovery"]["curve"][-1]["loss"] < recovery["curve"][-1]["loss"]


def test_a_model_that_was_pruned_before(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference, "COMPARED_WINDOWS", 2)  # fewer than the test text has
    argv = ["--prune_method", "magnitude", "--sparsity_ratio", "0.6"]
    _, first = run(tmp_path / "first", *argv)
    pruned = tmp_path / "first/model"
    argv = ["--model", pruned, "--teacher", "model", *RECOVER]
    _, second = run(tmp_path / "second", *argv)
    pruned_only = first["evaluation"][0]["compared_perplexity"]
    assert second["recovery"]["before"]["uk"]["perplexity"] == pytest.approx(pruned_only)
    _, second = run(tmp_path / "packed", *argv, *PACK)
    assert second["recovery"]["teacher"] == "model"
    curve = [point["perplexity"] for point in second["recovery"]["curve"]]
    assert min(curve) < curve[0]
    before = weights(pruned)
    for name, tensor in held(tmp_path / "packed/model", torch.float32).items():
        assert (tensor[before[f"{name}.weight"] == 0] == 0).all()


def test_8_bit_averages_train_biases_that_are_zero(tmp_path: Path) -> None:
    model = tiny.ARCHITECTURES["GPT-2"]()
    biases = [name for name, one in model.named_parameters() if ".h." in name and "bias" in name]
    for name in biases:
        model.get_parameter(name).data.zero_()
    tiny.write_model(tmp_path / "gpt", model)
    argv = ["--model", tmp_path / "gpt", *PRUNE, *RECOVER, "--recover_optimizer", "adamw8bit"]
    _, found = run(tmp_path, *argv)
    assert found["recovery"]["optimizer"] == "adamw8bit"
    after = weights(tmp_path / "model")
    assert all(after[name].any() for name in biases)


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--recover_rank", "4"]])
def test_packed_as_it_was_measured(flags: list[str], tmp_path: Path) -> None:
    """In no step after the training are weights rounded again."""
    argv = ["--prune_method", "wanda", "--sparsity_ratio", "0.5", *RECOVER, *flags, *PACK]
    done, found = run(tmp_path, *argv)
    assert "14 of 18 tensors as the 4-bit integers" in done.out
    assert found["packed"]["bits"] == 4 and found["sparsity"]["overall"] >= 0.5
    assert found["recovery"]["rank"] == (4 if "--recover_rank" in flags else None)
    assert len(held(tmp_path / "model", torch.float32)) == 14
    same = flags if "--dtype" in flags else []
    assert evaluated(tmp_path / "model", *same) == pytest.approx(found["perplexity"]["uk"], 1e-5)


def test_equal_training_of_a_model_that_nothing_was_pruned_from(tmp_path: Path) -> None:
    """It is its own teacher: every linear is trained, at first towards what it is."""
    _, found = run(tmp_path, *RECOVER, "--recover_ce_weight", "0.5")
    recovery = found["recovery"]
    assert found["method"] == "recovered" and recovery["teacher"] == "model"
    assert found["perplexity"]["uk"] < found["evaluation"][0]["dense"]["perplexity"]
    before, after = weights(Path("model")), weights(tmp_path / "model")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 9
    assert evaluated(tmp_path / "model") == pytest.approx(found["perplexity"]["uk"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("model", []),
        ("model", ["--recover", 512]),
        ("other", ["--recover", 512, "--dtype", "float32"]),  # saved in float32
        ("model", ["--recover", 512, *PRUNE]),
        ("model", ["--prune_method", "magnitude", "--sparsity_type", "neurons", "--recover", 512]),
    ],
)
def test_q4_0_as_it_was_measured(model: str, flags: list[str], tmp_path: Path) -> None:
    """A bfloat16 folder with every linear on the grid; with rows of 48 inputs left alone."""
    done, found = run(tmp_path, "--model", model, "--quantize", "q4_0", *flags)
    left = [f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)]
    left = left if model == "other" else []
    record = found["quantized"]
    assert record["tensors"] == 14 - len(left) and record["left"] == left
    assert 0 < record["difference"] < 3 and found["fingerprint"]["pruning"]["--quantize"] == "q4_0"
    assert ("at 16 bits (rows are not a multiple of 32): model.lay" in done.out) == bool(left)
    saved = weights(tmp_path / "model")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, tensor in saved.items():
        if "_proj" in name and name not in left:
            assert torch.equal(Q4_0().nearest(tensor), tensor.float())
    same = ["--dtype", "float32"] if model == "other" else []
    assert evaluated(tmp_path / "model", *same) == pytest.approx(found["perplexity"]["uk"], 1e-6)
    if PRUNE[0] in flags and "neurons" not in flags:
        assert found["sparsity"]["overall"] >= 0.5
    if "--recover" in flags:
        curve = [point["loss"] for point in found["recovery"]["curve"]]
        assert found["recovery"]["kept"]["loss"] == min(curve)
    else:
        assert found["evaluation"][0]["kl"] > 0 and found["method"] == "q4_0"


def test_iq4_nl_takes_no_model_with_zeros_by_pruning(tmp_path: Path) -> None:
    """Some zeros, which an original may have, become levels."""
    run(tmp_path, *PRUNE)
    argv = [*BASE, "--quantize", "iq4_nl", "--save_model", tmp_path / "small"]
    refused = call(*argv, "--model", tmp_path / "model")
    (line,) = refused.complaints
    assert refused.status == 1 and "50% of the weights of --model" in line
    assert "are pruned. Use --quantize q4_0" in line and not (tmp_path / "small").exists()
    some = AutoModelForCausalLM.from_pretrained("model", dtype="auto").requires_grad_(False)
    for name, weight in some.named_parameters():
        if "_proj" in name:
            weight[:, ::10] = 0
    tiny.write_model(tmp_path / "some", some)
    done = call(*argv, "--model", tmp_path / "some", "--recover", 512)
    assert done.status == 0 and re.search(r"the 1\d\.\d+% of the weights that are 0", done.out)
    for name, tensor in weights(tmp_path / "small").items():
        if "_proj" in name:
            assert IQ4_NL().holds(tensor) and bool((tensor != 0).all()), name


@pytest.mark.parametrize("kind", ["q4_0", "int4"])
def test_training_that_does_not_help_leaves_what_was_rounded_on_text(
    kind: str, tmp_path: Path
) -> None:
    argv = ["--quantize", "q4_0"] if kind == "q4_0" else [*PRUNE, *PACK]
    run(tmp_path / "rounded", *argv)
    done, found = run(tmp_path / "trained", *argv, "--recover", 512, "--recover_lr", "0.9")
    assert "training did not help; the model before it is kept" in done.out
    assert found["recovery"]["kept"]["tokens"] == 0
    rounded, trained = (weights(tmp_path / name / "model") for name in ("rounded", "trained"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in rounded.items())


@pytest.mark.parametrize(("kilobytes", "rank", "again"), [(830, 0, True), (780, 1, False)])
def test_memory_counts_the_teacher_and_what_a_rank_saves(
    kilobytes: int, rank: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights need 859 KB, 62 of them the teacher's; by updates of rank 1 it is 751 KB."""
    monkeypatch.setattr("lib.run.memory.available", lambda: 1000 * kilobytes)
    how = ["--recover", 64, "--batch_size", 1] + ["--recover_rank", rank] * bool(rank)
    done, _ = run(tmp_path, "--model", "other", *PRUNE, *how)
    assert ("; training recomputes activations" in done.out) == again
    assert ", teacher 61 KiB, " in done.out


def test_a_step_is_of_the_window_that_texts_allow(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "wide", tiny.tiny_llama(max_position_embeddings=1024))
    texts = tiny.sentences(60, words=60), tiny.sentences(8, 1, words=60)
    uk = tiny.write_texts(tmp_path / "uk", *texts)
    argv = ["--model", tmp_path / "wide", "--calibration_data", uk, "--nsamples", 8, *PRUNE]
    argv += ["--completions", 0, "--device", "cpu", "--save", tmp_path / "out"]
    done = call(*argv, "--recover", 600)
    assert done.status == 0 and "window: 128 tokens" in done.out, done.err
    assert results(tmp_path / "out")["recovery"]["tokens"] == 512
    (line,) = call(*argv, "--recover", 100).complaints
    assert "--recover 100: it is less than one step, a window of 128 tokens. Give at least" in line


REFUSED = {
    "zero": ([*PRUNE, "--recover", "0"], 2, "--recover: 0: must be"),
    "less than a step": ([*PRUNE, "--recover", "31"], 1, "--recover 31: it is less than"),
    "q4_0, packed": (["--quantize", "q4_0", *PRUNE, PACK[0]], 2, "Leave out --replace_sparse_lay"),
    "q4_0, loaded in 8 bits": (["--quantize", "q4_0", "--load_bit", "8"], 2, "--quantize q4_0: we"),
    "q4_0, measuring": (["--quantize", "q4_0", "--eval_only"], 2, "Leave out --eval_only"),
    "iq4_nl, packed": (["--quantize", "iq4_nl", PACK[0]], 2, "Leave out --replace_sparse_layers"),
    "iq4_nl, pruned": (["--quantize", "iq4_nl", *PRUNE], 1, "has no 0, as --prune_method"),
    "measuring": (["--eval_only", "--recover", "99"], 2, "--eval_only"),
    "rank": ([*PRUNE, *RECOVER, "--recover_rank", "0"], 2, "--recover_rank: 0: must be"),
    "shape": (["--teacher", "other", *RECOVER], 1, "--teacher other: its model.layers.0.mlp"),
    "words": (["--teacher", "foreign", *RECOVER], 1, "--teacher foreign: its vocabulary differs"),
    "nobody": (["--teacher", "./none", *RECOVER], 1, "--teacher ./none: "),
    "dense": (["--teacher", "model", *RECOVER], 1, "--model model: 0.0% of its blocks' weights"),
    "short": (
        ["--teacher", "model", *RECOVER, "--calibration_data", "short"],
        1,
        "--calibration_data short: its text fills 1 of 2 training windows of 32 tokens",
    ),
    "seen": (
        ["--teacher", "model", *RECOVER, "--calibration_data", "seen", "--eval_data", "seen"],
        1,
        "--calibration_data seen: its training text is part of the test text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    argv, status, words = REFUSED[case]
    found = call(*BASE, *argv)
    assert found.status == status, found
    (line,) = found.complaints
    assert words in line
