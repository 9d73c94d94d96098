"""`--recover` as a user gives it: what a run leaves, teachers, grids, memory, dialogues."""

from __future__ import annotations

import re
from pathlib import Path

import chats
import pytest
import tiny
import torch
from support import QUICK, mistake, results, succeed, weights
from transformers import AutoModelForCausalLM

from lib.formats.grids import IQ4_NL, Q4_0
from lib.model import reference

STEPS = 8
TOKENS = STEPS * 256 + 9
DATA = ["--calibration_data", "uk", "--eval_data", "uk"]
BASE = ["--model", "model", *QUICK, *DATA]
RECOVER = ["--recover", TOKENS, "--recover_lr", "0.01"]
PRUNE = ["--prune_method", "wanda", "--sparsity_type", "2:4"]
PACK = ["--replace_sparse_layers", "--quantize", "int4"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama().bfloat16())
    tiny.write_model(folder / "other", tiny.tiny_llama(intermediate_size=48))
    for name, template in dict(chat=chats.QWEN_3, gemma=chats.GEMMA, plain=None).items():
        tiny.write_model(folder / name, tokenizer=chats.tokenizer_with(template))
    tiny.write_texts(folder / "uk", train=200, test=4)
    chats.write(folder / "said", chats.some(200), chats.some(40, seed=1))
    return folder


def run(folder: Path, *argv: object) -> tuple[str, dict]:
    """What a run says and records; its model is in the folder."""
    done = succeed(*BASE, *argv, "--save", folder / "out", "--save_model", folder / "model")
    return done.out, results(folder / "out")


def evaluated(model: Path, *argv: object) -> float:
    """Perplexity of a model that was saved."""
    argv = ("--eval_data", "uk", *argv, "--save", model.parent / "evaluated")
    succeed("--model", model, *QUICK, "--eval_only", *argv)
    return results(model.parent / "evaluated")["perplexity"]["uk"]


def changed(before: Path, after: Path) -> set[str]:
    one, other = weights(before), weights(after)
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_what_a_run_leaves(tmp_path: Path) -> None:
    """It is measured as it is saved, has the zeros of pruning alone, and the norms have moved."""
    _, found = run(tmp_path / "recovered", *PRUNE, *RECOVER, "--recover_ce_weight", "0.3")
    recovery = found["recovery"]
    assert recovery["tokens"] == recovery["steps"] * recovery["windows"] * 32 <= TOKENS
    assert recovery["cross_entropy"] == 0.3 and recovery["rate"] == 0.01
    assert recovery["teacher"] == "model" and recovery["text"]["windows"] == STEPS * 8
    assert recovery["curve"][0]["tokens"] == 0 and len(recovery["curve"]) > 1
    assert set(recovery["before"]) == set(found["perplexity"]) == {"uk"}
    assert found["sparsity"]["overall"] == 0.5
    _, plain = run(tmp_path / "pruned", *PRUNE)
    before = recovery["before"]["uk"]["perplexity"]
    assert before == pytest.approx(plain["perplexity"]["uk"], rel=1e-6)
    model, pruned = tmp_path / "recovered/model", tmp_path / "pruned/model"
    moved, after = changed(pruned, model), weights(model)
    assert len(moved) == 2 * 9 and "lm_head.weight" not in moved
    for name, tensor in weights(pruned).items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(after[name][tensor == 0], tensor[tensor == 0])
    assert evaluated(model) == pytest.approx(found["perplexity"]["uk"], rel=1e-6)
    _, other = run(tmp_path / "ce", *PRUNE, *RECOVER, "--recover_ce_weight", "0")
    assert other["recovery"]["curve"][-1]["loss"] < recovery["curve"][-1]["loss"]


def test_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that was pruned before; and one that nothing was pruned from is its own: every
    linear is trained, at first towards what it is."""
    monkeypatch.setattr(reference, "COMPARED_WINDOWS", 2)  # fewer than the test text has
    exact = ["--dtype", "float32"]  # products in bfloat16 are rounded by the batch
    argv = ["--prune_method", "magnitude", "--sparsity_ratio", "0.6", *exact]
    _, first = run(tmp_path / "first", *argv)
    pruned = tmp_path / "first/model"
    argv = ["--model", pruned, "--teacher", "model", *RECOVER, *exact]
    _, second = run(tmp_path / "second", *argv)
    pruned_only = first["evaluation"][0]["compared_perplexity"]
    assert second["recovery"]["before"]["uk"]["perplexity"] == pytest.approx(pruned_only)
    assert second["recovery"]["teacher"] == "model"
    curve = [point["perplexity"] for point in second["recovery"]["curve"]]
    assert min(curve) < curve[0]
    _, found = run(tmp_path / "own", *RECOVER, "--recover_ce_weight", "0.5")
    assert found["method"] == "recovered" and found["recovery"]["teacher"] == "model"
    assert found["perplexity"]["uk"] < found["evaluation"][0]["dense"]["perplexity"]
    assert len(changed(Path("model"), tmp_path / "own/model")) == 2 * 9


@pytest.mark.full
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


def test_q4_0_is_saved_as_it_was_measured(tmp_path: Path) -> None:
    """A bfloat16 folder with every linear on the grid; rows of 48 inputs are left alone."""
    flags = ["--model", "other", "--quantize", "q4_0", "--dtype", "float32"]
    for more in ([], ["--recover", 512]):
        folder = tmp_path / f"{len(more)}"
        said, found = run(folder, *flags, *more)
        left = [f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)]
        record = found["quantized"]
        assert record["tensors"] == 12 and record["left"] == left
        assert 0 < record["difference"] < 3 and "multiple of 32" in said
        for name, tensor in weights(folder / "model").items():
            assert tensor.dtype == torch.bfloat16
            if "_proj" in name and name not in left:
                assert torch.equal(Q4_0().nearest(tensor), tensor.float())
        measured = evaluated(folder / "model", "--dtype", "float32")
        assert measured == pytest.approx(found["perplexity"]["uk"], rel=1e-6)
        if more:
            curve = [point["loss"] for point in found["recovery"]["curve"]]
            assert found["recovery"]["kept"]["loss"] == min(curve)
        else:
            assert found["evaluation"][0]["kl"] > 0 and found["method"] == "q4_0"


def test_iq4_nl_takes_no_model_with_zeros_by_pruning(tmp_path: Path) -> None:
    """Some zeros, which an original may have, become levels."""
    run(tmp_path, *PRUNE)
    argv = [*BASE, "--quantize", "iq4_nl", "--save_model", tmp_path / "small"]
    error = mistake(*argv, "--model", tmp_path / "model")
    assert "50% of the weights" in str(error) and not (tmp_path / "small").exists()
    some = AutoModelForCausalLM.from_pretrained("model", dtype="auto").requires_grad_(False)
    for name, weight in some.named_parameters():
        if "_proj" in name:
            weight[:, ::10] = 0
    tiny.write_model(tmp_path / "some", some)
    done = succeed(*argv, "--model", tmp_path / "some", "--recover", 512)
    assert re.search(r"the 1\d\.\d+% of the weights that are 0", done.out)
    for name, tensor in weights(tmp_path / "small").items():
        if "_proj" in name:
            assert IQ4_NL().is_on_grid(tensor) and bool((tensor != 0).all()), name


@pytest.mark.parametrize("flags", [["--quantize", "q4_0"], [*PRUNE, *PACK]], ids=["q4_0", "int4"])
def test_training_that_does_not_help_leaves_what_was_rounded(
    flags: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "rounded", *flags)
    said, found = run(tmp_path / "trained", *flags, "--recover", 512, "--recover_lr", "0.9")
    assert "training did not help" in said
    assert found["recovery"]["kept"]["tokens"] == 0
    assert not changed(tmp_path / "rounded/model", tmp_path / "trained/model")


@pytest.mark.parametrize(("kilobytes", "rank", "again"), [(900, 0, True), (920, 1, False)])
def test_memory_counts_the_teacher_and_what_a_rank_saves(
    kilobytes: int, rank: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights need 1,024 KB, or 868 with activations recomputed; updates of rank 1 915."""
    monkeypatch.setattr("lib.run.memory.available", lambda: 1000 * kilobytes)
    how = ["--recover", 64, "--batch_size", 1] + ["--recover_rank", rank] * bool(rank)
    said, _ = run(tmp_path, "--model", "other", *PRUNE, *how)
    assert ("training recomputes activations" in said) == again
    assert ", teacher 61 KiB, " in said


def test_a_step_is_of_the_window_that_texts_allow(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "wide", tiny.tiny_llama(max_position_embeddings=1024))
    texts = tiny.sentences(60, words=60), tiny.sentences(8, 1, words=60)
    uk = tiny.write_texts(tmp_path / "uk", *texts)
    argv = ["--model", tmp_path / "wide", "--calibration_data", uk, "--nsamples", 8, *PRUNE]
    argv += ["--completions", 0, "--device", "cpu", "--save", tmp_path / "out"]
    done = succeed(*argv, "--recover", 600)
    assert "window: 128 tokens" in done.out
    assert results(tmp_path / "out")["recovery"]["tokens"] == 512
    error = mistake(*argv, "--recover", 100)
    assert "--recover 100: " in f"{error}" and "128 tokens" in str(error)


# --- chat models


def test_rounded_trained_and_measured_on_dialogues(tmp_path: Path) -> None:
    flags = ["--model", "chat", "--calibration_data", "uk=1", "said=2", "--eval_data", "said"]
    flags += ["--quantize", "q4_0", "--recover", 1024, "--recover_lr", "0.01"]
    said, found = run(tmp_path, *flags, "--completions", "1")
    assert "distillation only" in said and found["recovery"]["cross_entropy"] == 0
    (test,) = found["evaluation"]
    assert test["dialogues"] == 40 and test["answer_tokens"] < test["tokens"] / 2
    assert test["kl"] > 0 and test["dense"]["perplexity"] > 1
    shares = [each["share"] for each in found["recovery"]["text"]["sources"]]
    assert shares == pytest.approx([1 / 3, 2 / 3], abs=0.1)
    (answers,) = found["answers"]
    assert answers["prompts"] == 1 and answers["limit"] > 40
    for name in ("dense", "model"):
        assert 0 <= answers[name]["ended"] <= 1 and 0 < answers[name]["tokens"]
    (shown,) = found["completions"]
    assert shown["prompt"] == chats.some(1, seed=1)[0][0]["content"]
    assert shown.keys() == {"test", "prompt", "dense", "model"}
    card = (tmp_path / "model/README.md").read_text("utf-8")
    assert shown["prompt"] in said and shown["prompt"] not in card
    assert all("answers that end, of 1" in text for text in (said, card))


def test_a_template_without_dialogues_changes_nothing(tmp_path: Path) -> None:
    """Nor does it with dialogues that are read as plain text."""
    found = []
    for name in ("gemma", "plain"):
        flags = ["--model", name, "--quantize", "q4_0", "--recover", 512]
        said, its = run(tmp_path / name, *flags)
        found.append(its)
        assert "distillation only" not in said
    assert found[0]["evaluation"] == found[1]["evaluation"] and "answers" not in found[0]
    flags = ["--model", "plain", "--calibration_data", "said", "--prune_method", "wanda"]
    _, found = run(tmp_path / "text", *flags, "--no_chat_template")
    assert "answers" not in found
