"""`--recover` as a user gives it: results, refusals, interruptions, several processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import processes
import pytest
import tiny
import torch
from support import QUICK, Done, call, results, weights
from transformers import AutoModelForCausalLM

from lib.commands.report import load_runs, report_text

TOKENS = 40 * 256 + 9  # forty steps
BASE = ["--model", "model", *QUICK, "--calibration_data", "uk", "--eval_data", "uk"]
RECOVER = ["--recover", TOKENS, "--recover_rate", "0.01"]
PRUNE = ["--prune_method", "wanda", "--sparsity_type", "2:4"]
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
    tiny.write_texts(folder / "short", train=["one two"] * 9, test=4)
    same = [
        json.loads(line)["text"] for line in (folder / "uk/test.jsonl").read_text().split("\n")[:-1]
    ]
    tiny.write_texts(folder / "seen", train=same, test=same)
    return folder


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A run with recovery, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        argv = [*BASE, *PRUNE, *RECOVER, "--save", folder / "out", "--save_model", folder / "model"]
        found = processes.run(argv, place)
    assert found.status == 0, found.err
    return found, folder


def test_what_a_run_says_and_leaves(done: tuple[Done, Path]) -> None:
    said, folder = done
    found = results(folder / "out")
    recovery = found["recovery"]
    assert recovery["tokens"] == recovery["steps"] * recovery["windows"] * 32 <= TOKENS
    assert recovery["seconds"] > 0 and found["seconds"]["recover"] >= recovery["seconds"]
    assert recovery["curve"][0]["tokens"] == 0 and len(recovery["curve"]) > 1
    assert set(recovery["dense"]) == set(recovery["before"]) == set(found["perplexity"]) == {"uk"}
    assert found["sparsity"]["overall"] == 0.5
    assert "recovery: training " in said.out and "recovery: perplexity " in said.out
    assert (folder / "out/recovery.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "model/README.md").read_text("utf-8")
    assert "| share of cross-entropy | 0.2 |" in card
    assert "wanda to 2:4 and recovered" in card and f"uk, {recovery['tokens']} tokens" in card
    assert f"{recovery['before']['uk']:.4f} | {found['perplexity']['uk']:.4f} |" in card
    assert "| wanda + recovery | 2:4" in report_text(load_runs([folder / "out"]))


def test_saved_as_measured_with_the_zeros_of_pruning_alone(
    done: tuple[Done, Path], tmp_path: Path
) -> None:
    _, folder = done
    plain = call(*BASE, *PRUNE, "--save", tmp_path / "out", "--save_model", tmp_path / "model")
    assert plain.status == 0 and "recovery" not in results(tmp_path / "out")
    alone = results(tmp_path / "out")["perplexity"]["uk"]
    assert results(folder / "out")["recovery"]["before"]["uk"] == pytest.approx(alone, rel=1e-6)
    before, after = weights(tmp_path / "model"), weights(folder / "model")
    changed = 0
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        zero = tensor == 0
        assert torch.equal(after[name][zero], tensor[zero])
        changed += not torch.equal(after[name], tensor)
    assert changed == 2 * 9 and torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    again = call("--model", folder / "model", *QUICK, "--eval_only", "--eval_data", "uk")
    measured = results(folder / "out")["perplexity"]["uk"]
    assert again.status == 0 and results()["perplexity"]["uk"] == pytest.approx(measured, rel=1e-6)


def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    argv = [*BASE, "--prune_method", "magnitude", "--sparsity_ratio", "0.6"]
    call(*argv, "--save", tmp_path / "first", "--save_model", tmp_path / "pruned")
    argv = [*BASE, "--model", tmp_path / "pruned", "--teacher", "model", *RECOVER]
    found = call(*argv, "--save", tmp_path / "second", "--save_model", tmp_path / "model")
    assert found.status == 0, found.err
    first, second = results(tmp_path / "first"), results(tmp_path / "second")
    assert second["recovery"]["before"] == pytest.approx(first["perplexity"])
    assert second["recovery"]["teacher"] == "model"
    assert second["sparsity"]["overall"] == pytest.approx(first["sparsity"]["overall"])
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "model")
    assert all(torch.all(after[name][one == 0] == 0) for name, one in before.items())
    assert "| pruned before + recovery | 60%" in " ".join(
        report_text(load_runs([tmp_path / "second"])).split()
    )
    assert "a pruned model recovered" in (tmp_path / "model/README.md").read_text("utf-8")


def test_at_a_low_rank_by_magnitude_and_packed(tmp_path: Path) -> None:
    argv = [*BASE, "--prune_method", "magnitude", "--sparsity_type", "2:4", *RECOVER]
    argv += ["--recover_rank", "4", "--replace_sparse_layers", "--save_model", tmp_path / "model"]
    found = call(*argv, "--save", tmp_path / "out")
    assert found.status == 0, found.err
    assert "recovery: updates of rank 4 to " in found.out
    assert results(tmp_path / "out")["recovery"]["rank"] == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert any("SparseLinear" in type(one).__name__ for one in model.modules())


def test_more_passes_over_a_short_text(tmp_path: Path) -> None:
    tiny.write_texts(tmp_path / "few", train=4, test=1)
    argv = [*BASE, "--nsamples", "3", "--calibration_data", tmp_path / "few", *PRUNE, *RECOVER]
    found = call(*argv, "--save", tmp_path / "out")
    assert found.status == 0, found.err
    (source,) = results(tmp_path / "out")["recovery"]["text"]["sources"]
    assert source["passes"] > 1 and f"are read {source['passes']} times" in found.out


REFUSED = {
    "zero": ([*PRUNE, "--recover", "0"], 2, "--recover 0: must be"),
    "less than a step": ([*PRUNE, "--recover", "31"], 1, "--recover 31: less than one step"),
    "no method, no teacher": (["--recover", "99"], 2, "--recover 99: give --prune_method, or"),
    "both": ([*PRUNE, *RECOVER, "--teacher", "model"], 2, "--teacher model: with --prune_method"),
    "measuring": (["--eval_only", "--recover", "99"], 2, "--eval_only changes no weight"),
    "nothing pruned": (
        [*PRUNE[:2], *RECOVER, "--sparsity_ratio", "0"],
        2,
        "--sparsity_ratio 0 there is nothing",
    ),
    "rank": ([*PRUNE, *RECOVER, "--recover_rank", "0"], 2, "--recover_rank 0: must be at least 1"),
    "rate": ([*PRUNE, *RECOVER, "--recover_rate", "nan"], 2, "--recover_rate nan: must be above"),
    "share": ([*PRUNE, *RECOVER, "--recover_ce", "1"], 2, "--recover_ce 1: must be from 0"),
    "alone": ([*PRUNE, "--recover_rank", "4"], 2, "--recover_rank 4: is for --recover"),
    "offload": ([*PRUNE, *RECOVER, "--offload", "away"], 2, "leave out --offload away"),
    "quantised": ([*PRUNE, *RECOVER, "--load_bit", "8"], 2, "leave out --load_bit 8"),
    "shape": (["--teacher", "other", *RECOVER], 1, "--teacher other: its model.layers.0.mlp"),
    "words": (["--teacher", "foreign", *RECOVER], 1, "--teacher foreign: has another vocabulary"),
    "nobody": (["--teacher", "./none", *RECOVER], 1, "--teacher ./none: "),
    "short": (
        ["--teacher", "model", *RECOVER, "--calibration_data", "short"],
        1,
        "--calibration_data short: its 9 texts give 0 windows of 32 tokens to recover on",
    ),
    "seen": (
        ["--teacher", "model", *RECOVER, "--calibration_data", "seen", "--eval_data", "seen"],
        1,
        "--calibration_data seen: its train text is part of the test text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_slow(case: str, no_weights: None) -> None:
    argv, status, words = REFUSED[case]
    found = call(*BASE, *argv)
    assert found.status == status, found
    (line,) = found.complaints
    assert words in line


def test_a_dense_model_is_refused(events: list[str]) -> None:
    found = call(*BASE, "--teacher", "model", *RECOVER)
    assert found.status == 1
    assert "--model model: 0.0% of its blocks' weights are zero" in found.complaints[0]
    assert "step load" in events and "step recover" not in events


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.run.memory.available", lambda: 10**5)
    found = call(*BASE, *PRUNE, *RECOVER)
    assert found.status == 1 and "or --recover_rank 16, which" in found.complaints[0]


@pytest.mark.parametrize("step", [0, 6, 33])
def test_killed_and_the_same_bytes(
    step: int, done: tuple[Done, Path], place: Path, tmp_path: Path
) -> None:
    _, folder = done
    argv = [*BASE, *PRUNE, *RECOVER, "--save_model", tmp_path / "model", "--save", tmp_path / "out"]
    argv += ["--resume", tmp_path / "kept"]
    assert processes.run(argv, place, f"step {step}:SIGKILL").status == -signal.SIGKILL
    assert (tmp_path / "kept/recovery.safetensors").exists() == (step > 0)
    found = call(*argv)
    assert found.status == 0, found.err
    name = "model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (folder / "model" / name).read_bytes()
    before, after = results(folder / "out"), results(tmp_path / "out")
    assert after["recovery"]["curve"] == before["recovery"]["curve"]
    assert not (tmp_path / "kept").exists()


def test_two_processes_as_one(done: tuple[Done, Path], place: Path, tmp_path: Path) -> None:
    _, folder = done
    argv = [*BASE, *PRUNE, *RECOVER, "--save", tmp_path / "out", "--save_model", tmp_path / "model"]
    first, second = processes.ended(processes.together(2, [argv], place))
    assert (first.status, second.status) == (0, 0), first.err + second.err
    said = [line for line in second.out.splitlines() if not line.startswith("[Gloo]")]
    assert (said, second.err) == ([], "")  # older releases of torch tell who is connected
    _same_course(results(folder / "out"), results(tmp_path / "out"))


def _same_course(one: dict, two: dict) -> None:
    """Within rounding the same losses and perplexities, on the same batches."""
    for before, after in zip(one["recovery"]["curve"], two["recovery"]["curve"], strict=True):
        assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-3)
        assert before["tokens"] == 0 or after["loss"] == pytest.approx(before["loss"], rel=1e-3)
    assert one["recovery"]["text"] == two["recovery"]["text"]


def test_the_flag_alone_decides_whether_a_run_is_the_same(done: tuple[Done, Path]) -> None:
    _, folder = done
    found = results(folder / "out")
    pruning = found["fingerprint"]["pruning"]
    assert pruning["--recover"] == TOKENS and pruning["windows of --recover"]
    assert found["settings"]["recover"] == TOKENS
