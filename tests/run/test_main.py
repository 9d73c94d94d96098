"""Whole runs of main.py on tiny models: what they compute, write, print and leave when stopped."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import (
    LIMIT,
    QUICK,
    Done,
    call,
    content,
    no_file_larger_than,
    raising,
    results,
    spawn,
    start,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.methods.registry import METHODS
from lib.util.folders import staged_folder

pytestmark = pytest.mark.usefixtures("elsewhere")

SEQLEN, WINDOWS = 32, 8  # of QUICK
KEYS = {"model", "method", "sparsity_type", "sparsity_ratio", "flags", "seed", "versions"}
KEYS |= {"device", "calibration", "evaluation", "perplexity", "sparsity", "seconds"}
KEYS |= {"peak_memory", "footprint"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def uk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "uk")


@pytest.fixture(scope="module")
def en(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = tiny.sentences(6, seed=7)
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "en", test=texts)


def succeeded(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def log(method: str, folder: Path | str = "out") -> dict[str, str]:
    """log_METHOD.txt as {column: value}."""
    text = Path(folder, f"log_{method}.txt").read_text("utf-8")
    assert text.endswith("\n")
    names, values = (line.split("\t") for line in text.splitlines())
    return dict(zip(names, values, strict=True))


def published_perplexity(folder: Path, texts: Path) -> float:
    """By the published rule, with nothing of this package: whole logits, window after window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = (texts / "test.jsonl").read_text("utf-8").splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    losses = []
    for index in range(ids.numel() // SEQLEN):
        window = ids[:, index * SEQLEN : (index + 1) * SEQLEN]
        with torch.no_grad():
            logits = model(window).logits.float()
        losses.append(F.cross_entropy(logits[0, :-1], window[0, 1:]) * SEQLEN)
    return math.exp(torch.stack(losses).sum() / (len(losses) * SEQLEN))


def zeros(folder: Path | str) -> dict[str, torch.Tensor]:
    """Where the weights of the decoder blocks' matrices are zero."""
    weights = load_file(Path(folder) / "model.safetensors")
    return {name: w == 0 for name, w in weights.items() if "layers" in name and w.dim() == 2}


# --- what a run computes and leaves


@pytest.mark.parametrize("kind", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run(method: str, kind: str, model: Path, uk: Path) -> None:
    given = ["--calibration_data", uk, "--sparsity_type", kind, "--save_model", "new", *QUICK]
    done = succeeded(call("--model", model, "--prune_method", method, *given))
    found = results()
    assert found.keys() >= KEYS
    assert found["flags"].items() >= {"nsamples": WINDOWS, "sparsity_type": kind}.items()
    steps = {"load", "dense", "prune", "eval", "save"}
    assert found["seconds"].keys() == steps
    assert found["peak_memory"]["host"] > 2**20
    size = sum(weight.nbytes for weight in load_file("new/model.safetensors").values())
    assert found["footprint"]["before"] == found["footprint"]["after"]
    assert size <= found["footprint"]["after"] < size + 1000  # and the rotary table

    masks = zeros("new")
    assert len(masks) == 14
    for mask in masks.values():
        assert mask.sum() * 2 == mask.numel()
        if kind != "unstructured":
            n, m = map(int, kind.split(":"))
            assert (mask.view(-1, m).sum(1) == n).all()
    assert found["sparsity"]["overall"] == 0.5
    shares = {f"{name}.weight": share for name, share in found["sparsity"]["linears"].items()}
    assert shares == dict.fromkeys(masks, 0.5)

    value = published_perplexity(Path("new"), uk)
    assert found["perplexity"] == {"uk": pytest.approx(value, rel=1e-4)}
    assert log(method) == {
        "method": method,
        "actual_sparsity": "0.5000",
        "ppl_test": f"{found['perplexity']['uk']:.4f}",
    }
    told = [line for line in done.out.splitlines() if "perplexity" in line]
    assert float(told[-1].split()[-1]) == pytest.approx(value, rel=1e-4)


def test_the_changed_options_of_the_method_are_shown(model: Path, uk: Path) -> None:
    given = ["--prune_method", "admm", "--calibration_data", uk, "--save_model", "new", *QUICK]
    told = succeeded(call("--model", model, *given, "--blend", "0.25")).out
    options = results()["options"]
    assert options.items() >= {"blend": 0.25, "exploring": 10, "refinements": 5}.items()
    card = Path("new/README.md").read_text("utf-8")
    assert "admm (blend 0.25): " in told and "| blend option | 0.25 |" in card
    assert "exploring" not in told + card  # options that have their defaults are not repeated


def test_what_is_not_a_linear_of_a_block_stays(model: Path, uk: Path) -> None:
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", "new", *QUICK]
    succeeded(call("--model", model, *given))
    before, after = load_file(model / "model.safetensors"), load_file("new/model.safetensors")
    assert before.keys() == after.keys()
    for name in before.keys() - zeros("new").keys():
        assert torch.equal(before[name], after[name]), name
    for name, mask in zeros("new").items():  # wanda only drops
        assert torch.equal(before[name].masked_fill(mask, 0), after[name]), name


def test_a_fresh_process_loads_what_was_saved(model: Path, uk: Path, tmp_path: Path) -> None:
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", "new", *QUICK]
    succeeded(call("--model", model, *given))
    again = ["--eval_only", "--eval_data", uk, *QUICK, "--save", "again"]
    done = succeeded(spawn(["--model", "new", *again], tmp_path))
    assert log("dense", "again") == log("wanda") | {"method": "dense"}
    assert done.complaints == []
    found = results("again")
    assert found["method"] == "dense" and found["calibration"] is None
    assert found["sparsity_type"] is None and found["sparsity_ratio"] is None


def test_evaluation_alone(model: Path, uk: Path) -> None:
    succeeded(call("--model", model, "--eval_only", "--eval_data", uk, *QUICK))
    value = published_perplexity(model, uk)
    assert log("dense")["actual_sparsity"] == "0.0000"
    assert float(log("dense")["ppl_test"]) == pytest.approx(value, rel=1e-4)
    [test] = results()["evaluation"]
    assert test["tokens"] == test["windows"] * SEQLEN == test["windows"] * test["seqlen"]
    nats = math.log(value) * test["windows"] * (SEQLEN - 1)
    assert test["bits_per_byte"] == pytest.approx(nats / math.log(2) / test["bytes"], rel=1e-4)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantised_models_are_evaluated(bits: str, trained: Path, uk: Path) -> None:
    given = ["--eval_only", "--eval_data", uk, *QUICK]
    succeeded(call("--model", trained, *given))
    done = succeeded(call("--model", trained, *given, "--load_bit", bits, "--save", "small"))
    dense, small = results(), results("small")
    near = {"8": 0.005, "4": 0.02}[bits]  # to zero every matrix multiplies it by 200
    assert small["perplexity"]["uk"] == pytest.approx(dense["perplexity"]["uk"], rel=near)
    assert small["perplexity"]["uk"] != dense["perplexity"]["uk"]
    assert small["footprint"]["after"] < dense["footprint"]["after"]
    assert done.complaints == []


def test_several_test_sets(model: Path, uk: Path, en: Path) -> None:
    given = ["--prune_method", "magnitude", "--eval_data", en, uk, *QUICK]
    done = succeeded(call("--model", model, *given))
    found = results()["perplexity"]
    assert list(found) == ["en", "uk"] and found["en"] != found["uk"]
    row = log("magnitude")
    assert list(row) == ["method", "actual_sparsity", "ppl_test", "ppl_en", "ppl_uk"]
    assert row["ppl_test"] == row["ppl_en"] == f"{found['en']:.4f}"
    assert row["ppl_uk"] == f"{found['uk']:.4f}"
    told = [line for line in done.out.splitlines() if "perplexity" in line]
    assert told[-1].endswith(f" {found['uk']:.4f}")


def test_one_window_has_no_standard_error(model: Path, tmp_path: Path) -> None:
    texts = tiny.write_texts(tmp_path / "uk", test=tiny.sentences(1, words=10))
    succeeded(call("--model", model, "--eval_only", "--eval_data", texts, *QUICK))
    [test] = results()["evaluation"]
    assert test["windows"] == 1 and test["standard_error"] is None


def test_a_hub_that_is_out_of_reach_but_a_model_that_is_in_the_cache(
    model: Path, uk: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "weights" / "models--owner--name"
    shutil.copytree(model, cached / "snapshots" / "a1b2c3")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1b2c3")
    given = ["--prune_method", "magnitude", "--eval_data", uk, "--save_model", "new", *QUICK]
    succeeded(call("--model", "owner/name", "--cache_dir", tmp_path / "weights", *given))
    assert "base_model: owner/name\n" in Path("new/README.md").read_text("utf-8")


# --- what a run may not depend on


@pytest.mark.parametrize("method", METHODS)
def test_same_flags_same_bytes(method: str, model: Path, uk: Path) -> None:
    given = ["--prune_method", method, "--calibration_data", uk, *QUICK]
    for name in ("a", "b"):
        succeeded(call("--model", model, *given, "--save", name, "--save_model", f"{name}-model"))
    files = [Path(f"{name}-model/model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert results("a")["perplexity"] == results("b")["perplexity"]


def test_another_seed_draws_other_windows(model: Path, uk: Path) -> None:
    given = ["--prune_method", "wanda", "--calibration_data", uk, *QUICK]
    for seed in (0, 1):
        succeeded(call("--model", model, *given, "--seed", seed, "--save", f"seed{seed}"))
    one, other = (results(f"seed{seed}") for seed in (0, 1))
    assert one["calibration"]["digest"] != other["calibration"]["digest"]
    assert one["perplexity"] != other["perplexity"]
    assert other["seed"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_batches_change_rounding_only(method: str, model: Path, uk: Path) -> None:
    given = ["--prune_method", method, "--calibration_data", uk, *QUICK]
    for size in (1, 3, 100):
        folders = ["--save", f"{size}", "--save_model", f"{size}-model"]
        succeeded(call("--model", model, *given, "--batch_size", size, *folders))
    one, three, all_ = (results(f"{size}")["perplexity"]["uk"] for size in (1, 3, 100))
    assert one == pytest.approx(three, rel=1e-4) == pytest.approx(all_, rel=1e-4)
    masks = [zeros(f"{size}-model") for size in (1, 3, 100)]
    for name, mask in masks[0].items():
        for other in masks[1:]:
            assert (mask != other[name]).float().mean() < 0.002, name


def test_dtypes(trained: Path, uk: Path, tmp_path: Path) -> None:
    """A bfloat16 checkpoint: worked on in float32 or bfloat16, saved in bfloat16 in both cases."""
    learned = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    halves = tiny.write_model(tmp_path / "halves", learned)
    given = ["--prune_method", "wanda", "--calibration_data", uk, *QUICK]
    for dtype in ("auto", "bfloat16", "float32"):
        folders = ["--save", dtype, "--save_model", f"{dtype}-model"]
        succeeded(call("--model", halves, *given, "--dtype", dtype, *folders))
        with safe_open(f"{dtype}-model/model.safetensors", framework="pt") as weights:
            kinds = {weights.get_tensor(name).dtype for name in weights.keys()}
        saved = torch.float32 if dtype == "float32" else torch.bfloat16
        assert kinds == {saved}
        config = json.loads(Path(f"{dtype}-model/config.json").read_text("utf-8"))
        assert config["dtype"] == str(saved).removeprefix("torch.")
        again = ["--eval_only", "--eval_data", uk, *QUICK, "--save", "again", "--dtype", dtype]
        succeeded(call("--model", f"{dtype}-model", *again))
        assert log("dense", "again")["ppl_test"] == log("wanda", dtype)["ppl_test"]
    exact, rounded = (results(dtype)["perplexity"]["uk"] for dtype in ("auto", "bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("argv", "said"), [("--help", "calibration:"), ("--model=M", "error:")])
def test_help_and_mistakes_import_nothing_heavy(argv: str, said: str, tmp_path: Path) -> None:
    code = (
        "import sys, main\n"
        "try: main.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('imported:', *sys.modules)"
    )
    out, err = start(["-c", code, argv], tmp_path).communicate(timeout=LIMIT)
    assert said in out + err
    _, imported = out.split("imported:")
    heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "matplotlib"}
    assert not heavy.intersection(imported.split())


def test_help_tells_groups_units_and_defaults() -> None:
    done = succeeded(call("--help"))
    text = " ".join(done.out.split())
    for part in ("model:", "calibration:", "pruning:", "evaluation:", "output:"):
        assert f" {part} " in text
    for part in ("(at least 1; default: 128)", "(default: cuda:0)", "window in tokens", *METHODS):
        assert part in text


# --- stopped runs


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What an earlier run saved."""
    with staged_folder(tmp_path / "new") as stage:
        for name in ("config.json", "model.safetensors", "README.md"):
            (stage / name).write_text("old")
    return tmp_path / "new"


def nothing_half_written(folder: Path) -> None:
    assert not [path.name for path in folder.rglob("*") if ".partial-" in path.name]


def test_a_full_disk_leaves_the_old_folder(
    model: Path, uk: Path, tmp_path: Path, target: Path
) -> None:
    old = content(target)
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    with no_file_larger_than(100_000):  # the weights have 158,000
        done = call("--model", model, *given)
    assert done.status == 1 and len(done.complaints) == 1, done.err
    assert str(target) in done.complaints[0] and "can't be saved" in done.complaints[0]
    assert content(target) == old
    nothing_half_written(tmp_path)
    assert results()["perplexity"]  # measured before saving, and kept


def test_results_that_can_not_be_written(model: Path, uk: Path) -> None:
    given = ["--prune_method", "wanda", "--calibration_data", uk, *QUICK]
    succeeded(call("--model", model, *given))
    before = content(Path("out"))
    with no_file_larger_than(500):
        done = call("--model", model, *given, "--seed", "1")
    assert done.status == 1 and len(done.complaints) == 1, done.err
    after = content(Path("out"))
    assert after.keys() == before.keys()
    assert after["results.json"] == before["results.json"]


def test_an_interrupt_while_saving(model: Path, uk: Path, tmp_path: Path, target: Path) -> None:
    old = content(target)
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    with raising(KeyboardInterrupt(), "tokenizer.model"):
        done = call("--model", model, *given)
    assert (done.status, done.complaints) == (130, ["interrupted"])
    assert content(target) == old
    nothing_half_written(tmp_path)


SLOW = """
import sys, time
import main
from lib.util import command, events

def wait(event, number):
    if f"{{event}} {{number}}" == "{moment}":
        print("begun", flush=True)
        time.sleep(1000)

events.listeners.append(wait)
sys.exit(command.run(main.main))
"""


def stopped(sent: signal.Signals, moment: str, argv: list, folder: Path) -> Done:
    """Run main.py, and send a signal as soon as it comes to a moment, where it then waits."""
    process = start(["-c", SLOW.format(moment=moment), *map(str, argv)], folder)
    try:
        while (line := process.stdout.readline()) != "begun\n":
            assert line, process.stderr.read()  # it ended before
        process.send_signal(sent)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def test_ctrl_c_while_pruning(model: Path, uk: Path, target: Path, tmp_path: Path) -> None:
    old = content(target)
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    done = stopped(signal.SIGINT, "pruning 1", ["--model", model, *given], tmp_path)
    assert (done.status, done.complaints) == (130, ["interrupted"])
    assert content(target) == old
    nothing_half_written(tmp_path)


def test_killed_while_saving(model: Path, uk: Path, target: Path, tmp_path: Path) -> None:
    old = content(target)
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    argv = ["--model", model, *given]
    done = stopped(signal.SIGKILL, "tokenizer.model 0", argv, tmp_path)
    assert done.status == -signal.SIGKILL
    assert content(target) == old
    assert [path for path in tmp_path.iterdir() if ".partial-" in path.name]  # the stage is left
    succeeded(call(*argv))  # and goes when the next run saves
    nothing_half_written(tmp_path)
    assert zeros(target)


def test_a_users_files_stay(model: Path, uk: Path, target: Path) -> None:
    """A note beside the model, a card edited by hand: refused before anything slow."""
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    (target / "README.md").write_text("new")
    before = content(target)
    done = call("--model", "no/such/model", *given)
    assert done.status == 1 and done.complaints == [
        f"error: --save_model {target}: holds README.md, which was changed since a run wrote it "
        "and would be lost; name another folder"
    ]
    (target / "README.md").write_text("old")
    succeeded(call("--model", model, *given))
    (target / "notes.txt").write_text("mine")
    done = call("--model", model, *given)
    assert done.status == 1 and "holds notes.txt" in done.complaints[0]
    (target / "notes.txt").unlink()
    succeeded(call("--model", model, *given))  # over what the last one wrote
    assert content(target) != before


def test_two_runs_at_once_with_one_target(model: Path, uk: Path, target: Path) -> None:
    given = ["--prune_method", "wanda", "--calibration_data", uk, "--save_model", target, *QUICK]
    with staged_folder(target, "--save_model") as stage:
        done = call("--model", model, *given)
        assert done.status == 1 and "another run is going to write it" in done.complaints[0]
        (stage / "a").write_text("of the first")
    assert content(target).keys() == {"a", "manifest.json"}
