"""Many runs by one command: which there are, which are done again, and that each is as if alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, ROOT, Done, call, content, launched, results

from lib.model import pretrained
from lib.model.access import Checkpoint
from lib.report.results import load_runs
from lib.run import fingerprint
from lib.sweep import languages
from lib.sweep import sweep as command_of_sweep
from lib.sweep.plan import plan
from lib.util import command
from lib.util.events import listening

pytestmark = pytest.mark.usefixtures("elsewhere")
WANDA = ["--methods", "wanda", "--types", "unstructured"]
PASSED = ["--", *QUICK]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in another dtype than the one that runs compute in, with tied embeddings."""
    llama = tiny.tiny_llama(seed=1, tie_word_embeddings=True).to(torch.bfloat16)
    return tiny.write_model(tmp_path_factory.mktemp("models") / "half", llama)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    english = tiny.sentences(20, seed=9)
    return tiny.write_texts(folder / "uk"), tiny.write_texts(folder / "en", english, english[:8])


@pytest.fixture
def loads() -> Iterator[list[str]]:
    """The models whose weights were read, in order."""
    seen: list[str] = []

    def listen(event: str, _: int) -> None:
        if event.startswith("weights of "):
            seen.append(event.removeprefix("weights of "))

    with listening(listen):
        yield seen


@pytest.fixture
def runs() -> Iterator[list[str]]:
    """The runs that were worked on, in order, without their model's name."""
    seen: list[str] = []

    def listen(event: str, _: int) -> None:
        if event.startswith("run "):
            seen.append(event.rpartition("/")[2])

    with listening(listen):
        yield seen


@contextmanager
def failing(run: str, step: str, error: BaseException) -> Iterator[None]:
    """Inside, a run fails at the beginning of a step."""
    running = ""

    def listen(event: str, _: int) -> None:
        nonlocal running
        running = event if event.startswith("run ") else running
        if event == f"step {step}" and running == f"run {run}":
            raise error

    with listening(listen):
        yield


def sweep(*argv: object, main=command_of_sweep.main) -> Done:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = command.run(main, [str(part) for part in argv])
        except SystemExit as left:
            status = left.code
    return Done(status, out.getvalue(), err.getvalue())


def planned(*argv: object, passed_on: tuple[str, ...] = ()) -> list:
    parser = command_of_sweep.build_sweep_parser()
    return plan(parser.parse_args([str(part) for part in argv]), passed_on)


# --- which runs there are


def test_the_product_leaves_out_what_makes_no_sense(texts):
    uk, en = texts
    mixture = f"{uk}=0.75,{en}=0.25"
    names = [
        run.name
        for run in planned(
            *["--models", "a/one", "two", "--methods", "magnitude", "wanda"],
            *["--types", "unstructured", "4:8", "--ratios", 0.5, 0.7],
            *["--calibration", uk, mixture, "--seeds", 0, 3],
        )
    ]
    settings = ["50", "70", "4of8"]
    drawn = [f"{text}-seed{seed}" for text in ("uk", "uk=0.75+en=0.25") for seed in (0, 3)]
    each = ["dense", *(f"magnitude-{setting}" for setting in settings)]
    each += [f"wanda-{setting}-{text}" for setting in settings for text in drawn]
    assert names == [f"{folder}/{name}" for folder in ("one", "two") for name in each]


def test_flags_of_a_run(texts):
    uk, en = texts
    argv = ["--models", "m", *WANDA, "--calibration", f"{uk}=3,{en}=1", "--out", "o", "--seeds", 5]
    dense, wanda = planned(*argv, "--save_models", passed_on=("--nsamples", "7"))
    assert dense.args.eval_only and not dense.args.save_model
    assert dense.args.eval_data == wanda.args.eval_data == [str(uk), str(en)]
    assert wanda.args.calibration_data == [f"{uk}=3", f"{en}=1"]
    assert (wanda.args.seed, wanda.args.sparsity_ratio, wanda.args.nsamples) == (5, 0.5, 7)
    assert Path(wanda.args.save) == Path("o/m/wanda-50-uk=0.75+en=0.25-seed5")
    assert Path(wanda.args.save_model).parent == Path(wanda.args.save)


def test_flags_that_fit_only_some_runs_go_to_those(texts):
    flags = ("--use_variant", "--replace_sparse_layers", "--pack_bits", "8")
    found = planned(
        *["--models", "m", "--methods", "wanda", "sparsegpt", "--calibration", texts[0]],
        passed_on=flags,
    )
    assert [run.name for run in found if run.args.use_variant] == ["m/wanda-50-uk-seed0"]
    for run in found:  # whatever is pruned, and the dense model not
        packs = run.args.replace_sparse_layers, run.args.pack_bits
        assert packs == ((True, 8) if run.args.prune_method else (False, 16))


def test_recovery_goes_to_prunings_and_gives_each_its_text(texts):
    argv = ["--models", "m", "--methods", "magnitude", "wanda", "--types", "2:4"]
    found = planned(*argv, "--calibration", texts[0], passed_on=("--recover", "999"))
    assert {run.name: run.args.recover for run in found} == {
        "m/dense": None,
        "m/magnitude-2of4-uk-seed0": 999,
        "m/wanda-2of4-uk-seed0": 999,
    }
    assert found[1].args.calibration_data == [str(texts[0])]


def test_sets_and_models_of_one_name_get_folders_of_their_own(tmp_path):
    for parent in "ab":
        tiny.write_texts(tmp_path / parent / "uk", 1, 1)
    argv = ["--models", "x/m", "y/m", *WANDA, "--calibration", "a/uk", "b/uk"]
    names = [run.name for run in planned(*argv)]
    prunings = ["dense", "wanda-50-a_uk-seed0", "wanda-50-b_uk-seed0"]
    assert names == [f"{model}/{name}" for model in ("x_m", "y_m") for name in prunings]


def test_finished_blocks_of_two_runs_do_not_meet(texts):
    found = planned("--models", "m", *WANDA, "--calibration", *texts, passed_on=("--resume", "r"))
    assert len({run.args.resume for run in found}) == len(found)


def test_a_sweep_is_one_process(model, monkeypatch, runs):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = sweep("--models", model)
    assert done.status == 1 and not runs and "one process" in done.complaints[0]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--methods", "nosuch"], 2, ["--methods", "nosuch"]),
        (["--ratios", "1.5"], 2, ["--sparsity_ratio 1.5"]),
        (["--types", "2:4", "--ratios", "0.7"], 2, ["--ratios 0.7", "--types unstructured"]),
        (["--", "--seed", "1"], 2, ["--seed after '--'"]),
        (["--", "--prune_method=wanda"], 2, ["--prune_method after '--'"]),
        (["--", "--nosuch"], 2, ["--nosuch"]),
        (["--methods", "magnitude", "--", "--use_variant"], 2, ["--use_variant", "fits none"]),
        (["--calibration", "no/such/folder"], 1, ["--calibration no/such/folder"]),
        (["--calibration", "c4=-1,ubertext=1"], 1, ["--calibration c4=-1", "above 0"]),
        (["--eval_data", "no/such/folder"], 1, ["--eval_data no/such/folder"]),
        (["--ratios", "0.5", "0.5"], 1, ["--out", "wanda-50-ubertext-seed0", "twice"]),
    ],
)
def test_a_mistake_is_told_before_the_first_run(model, runs, argv, status, words):
    done = sweep("--models", model, *argv)
    assert done.status == status and not runs
    assert len(done.complaints) == 1
    assert all(word in done.complaints[0] for word in words), done.complaints


# --- each run is as if alone


@pytest.mark.parametrize(
    ("checkpoint", "method", "kind", "sets"),
    [("model", "wanda", "unstructured", 2), ("bfloat16", "sparsegpt", "2:4", 1)],
)
def test_every_run_gives_what_main_gives(
    checkpoint, method, kind, sets, request, texts, loads, tmp_path
):
    name = request.getfixturevalue(checkpoint)
    done = sweep(
        *["--models", name, "--methods", method, "magnitude", "--types", kind],
        *["--calibration", *texts[:sets], "--eval_data", *texts, "--save_models"],
        *["--out", "runs", *PASSED, "--prompts", "1"],
    )
    assert done.status == 0, done
    assert loads == [str(name)]
    found = load_runs(["runs"])
    assert len(found) == 2 + sets  # dense and magnitude read no text
    for index, run in enumerate(found):
        flags = run.results["flags"]
        argv = ["--model", name, *QUICK, "--prompts", "1", "--eval_data", *texts]
        argv += ["--save", tmp_path / f"s{index}"]
        if flags["eval_only"]:
            argv += ["--eval_only"]
        else:
            argv += ["--prune_method", flags["prune_method"], "--save_model", tmp_path / "alone"]
            argv += ["--sparsity_type", flags["sparsity_type"]]
        if flags["calibration_data"]:
            argv += ["--calibration_data", *flags["calibration_data"]]
        assert call(*argv).status == 0
        alone = results(tmp_path / f"s{index}")
        for key in "perplexity evaluation sparsity calibration footprint completions".split():
            assert run.results[key] == alone[key], run.folder
        for file in ("model.safetensors", "config.json") if flags["save_model"] else ():
            mine, other = run.folder / "model" / file, tmp_path / "alone" / file
            assert mine.read_bytes() == other.read_bytes(), run.folder


def test_a_run_leaves_the_dense_model_untouched(model):
    dense = pretrained.load_model(
        Checkpoint(str(model)),
        pretrained.load_config(Checkpoint(str(model))),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    used = pretrained.fresh_copy(dense)
    for block in used.model.layers:
        for parameter in block.parameters():
            parameter.data.zero_()
    used.model.layers[0].mlp = torch.nn.Identity()
    used.to(torch.float16)
    used.config.dtype = torch.float16
    after = dense.state_dict()
    assert before.keys() == after.keys() and dense.config.dtype == torch.float32
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    unused = pretrained.fresh_copy(dense)
    shared = unused.model.embed_tokens.weight, dense.model.embed_tokens.weight
    assert shared[0].data_ptr() == shared[1].data_ptr()  # one copy of what no run writes into


def test_each_model_is_read_once(model, bfloat16, texts, loads):
    argv = ["--models", model, bfloat16, *WANDA, "--calibration", texts[0], "--seeds", 0, 1]
    assert sweep(*argv, *PASSED).status == 0
    assert loads == [str(model), str(bfloat16)]


def test_the_dense_model_generates_once(model, texts, events):
    argv = ["--models", model, *WANDA, "--calibration", *texts, "--seeds", 0, 1]
    assert sweep(*argv, *PASSED, "--prompts", 1).status == 0
    # every run's own model, and the dense one beside the prunings
    assert events.count("step completions") == 5 + 1
    assert "### Completions: uk" in Path("runs/report.md").read_text("utf-8")
    assert sweep(*argv, *PASSED, "--prompts", 0).status == 0
    assert events.count("step completions") == 6  # nothing is done again for it


def test_an_offloaded_model_is_read_by_every_run(model, texts, loads):
    argv = ["--models", model, *WANDA, "--calibration", texts[0]]
    assert sweep(*argv, *PASSED, "--offload", "away").status == 0
    assert loads == [str(model)] * 2


# --- finished, changed, interrupted, failed


def test_finished_runs_are_kept_and_changed_ones_done_again(model, texts, runs, loads):
    argv = ["--models", model, *WANDA, "--calibration", texts[0]]
    wanda = "wanda-50-uk-seed0"
    first = sweep(*argv, *PASSED)
    assert first.status == 0 and runs == ["dense", wanda]
    runs.clear()
    again = sweep(*argv, *PASSED)
    assert again.status == 0 and not runs and loads == [str(model)]
    assert "2 runs, 2 of them finished before" in again.out
    assert "| wanda" in again.out  # the table, all the same
    more = sweep(*argv, "--seeds", 0, 1, *PASSED)
    assert more.status == 0 and runs == ["wanda-50-uk-seed1"]
    runs.clear()
    changed = sweep(*argv, *PASSED, "--nsamples", 9)
    assert changed.status == 0 and runs == [wanda]  # the dense model draws no windows
    assert f"{wanda}: --nsamples was 8, is 9" in changed.out
    runs.clear()
    assert sweep(*argv, "--save_models", *PASSED, "--nsamples", 9).status == 0 and runs == [wanda]
    runs.clear()
    shutil.rmtree(Path("runs", model.name, wanda, "model"))
    lost = sweep(*argv, "--save_models", *PASSED, "--nsamples", 9)
    assert runs == [wanda] and "its model was not kept" in lost.out


def test_what_stands_behind_a_flag_counts_not_its_name(texts, runs, tmp_path):
    """One word of a text, one shard of the weights: no number of before is shown as today's."""
    uk = tiny.write_texts(tmp_path / "texts" / "uk")
    llama = tiny.write_model(tmp_path / "llama", tiny.tiny_llama(seed=1))
    argv = ["--models", llama, *WANDA, "--calibration", uk, *PASSED]
    wanda = "wanda-50-uk-seed0"
    assert sweep(*argv).status == 0

    def again(told: str, *done: str) -> None:
        runs.clear()
        said = sweep(*argv)
        assert said.status == 0 and runs == list(done), said
        assert told in said.out

    again("2 of them finished before")
    train = uk / "train.jsonl"
    train.write_text(train.read_text("utf-8").replace("сонце", "місяць", 40), "utf-8")
    again("windows of --calibration_data was", wanda)
    test = uk / "test.jsonl"
    test.write_text(test.read_text("utf-8").replace("ріка", "гора", 1), "utf-8")
    again("windows of --eval_data uk was", "dense", wanda)
    other = tiny.write_model(tmp_path / "other", tiny.tiny_llama(seed=2))
    shutil.copy(other / "model.safetensors", llama)  # of the same size
    again("weights of --model was", "dense", wanda)
    argv += ["--batch_size", 3, "--cache_dir", "other"]  # speed and places change nothing
    again("2 of them finished before")


def test_results_of_other_packages_are_made_again_and_those_of_other_code_kept(
    model, texts, runs, monkeypatch
):
    argv = ["--models", model, *WANDA, "--calibration", texts[0], *PASSED]
    assert sweep(*argv).status == 0
    runs.clear()
    monkeypatch.setattr(fingerprint, "code_digest", lambda: "of tomorrow")
    done = sweep(*argv)
    assert done.status == 0 and not runs  # hours of work are not done again for a new version
    assert done.out.count("code of the program was") == 2 and "results are kept" in done.out
    known = fingerprint.versions()
    monkeypatch.setattr(fingerprint, "versions", lambda: known | {"torch": "99.0"})
    done = sweep(*argv)
    assert len(runs) == 2 and "version of torch was" in done.out


@pytest.mark.parametrize("step", ["prune", "eval", "save"])
def test_goes_on_after_an_interruption(model, texts, runs, step):
    argv = ["--models", model, "--methods", "wanda", "--types", "unstructured", "2:4"]
    argv += ["--calibration", texts[0], "--save_models", *PASSED]
    with failing("tiny/wanda-2of4-uk-seed0", step, KeyboardInterrupt()):
        done = sweep(*argv)
    assert (done.status, done.complaints) == (130, ["interrupted"])
    runs.clear()
    done = sweep(*argv)
    assert done.status == 0 and runs == ["wanda-2of4-uk-seed0"]
    assert "[3/3]" in done.out


def test_a_failure_is_recorded_and_does_not_stop_the_rest(model, texts, runs, tmp_path):
    few = tiny.write_texts(tmp_path / "few", 3, 8)
    argv = ["--models", model, tmp_path / "nosuch", *WANDA, "--calibration", few, texts[0]]
    done = sweep(*argv, *PASSED)
    assert done.status == 1 and len(runs) == 6
    complaint = done.complaints[-1]
    for name in ("tiny/wanda-50-few-seed0", "nosuch/dense", "nosuch/wanda-50-uk-seed0"):
        assert name in complaint
    assert complaint.startswith("error: 4 of 6 runs failed")
    failed = json.loads(Path("runs/tiny/wanda-50-few-seed0/error.json").read_text("utf-8"))
    assert "can give only 3 windows" in failed["error"] and failed["flags"]["nsamples"] == 8
    assert "**Failed runs: 4**" in done.out and "can give only 3 windows" in done.out
    assert results("runs/tiny/wanda-50-uk-seed0")["perplexity"]
    assert Path("runs/report.md").is_file() and Path("runs/report.csv").is_file()

    tiny.write_texts(few, 20, 8)
    runs.clear()
    done = sweep("--models", model, *argv[3:], *PASSED)
    assert done.status == 0 and runs == ["wanda-50-few-seed0"]
    assert "failed before" in done.out
    assert results("runs/tiny/wanda-50-few-seed0")["perplexity"]
    assert not Path("runs/tiny/wanda-50-few-seed0/error.json").exists()


def test_a_defect_in_one_run_shows_its_traceback_and_does_not_stop_the_rest(model, texts):
    argv = ["--models", model, *WANDA, "--calibration", texts[0], "--seeds", 0, 1]
    with failing("tiny/wanda-50-uk-seed0", "prune", RuntimeError("a defect")):
        done = sweep(*argv, *PASSED)
    assert done.status == 1 and "Traceback" in done.err
    failed = json.loads(Path("runs/tiny/wanda-50-uk-seed0/error.json").read_text("utf-8"))
    assert failed["error"] == "RuntimeError: a defect"
    assert results("runs/tiny/wanda-50-uk-seed1")["perplexity"]


def test_results_that_can_not_be_checked_are_kept(model, texts, runs, tmp_path):
    """No GPU today, a disk that is not there: a look at the table costs no figure."""
    moved = shutil.copytree(model, tmp_path / "model")
    argv = ["--models", moved, *WANDA, "--calibration", texts[0]]
    assert sweep(*argv, *PASSED).status == 0
    before = content(Path("runs"))
    runs.clear()
    for passed in (["--", *QUICK[2:]], PASSED):  # on cuda:0, which is not there
        done = sweep(*argv, *passed)
        assert done.status == 0 and not runs, done
        assert done.out.count("can't be checked") == 2 and "| wanda" in done.out
        for run in load_runs(["runs"]):
            assert run.results["perplexity"] and run.failure is None
        shutil.move(moved, tmp_path / "away") if moved.is_dir() else None
    after = content(Path("runs"))
    assert {name: before[name] for name in before if "results" in name} == {
        name: after[name] for name in after if "results" in name
    }


def test_a_run_that_fails_again_keeps_its_figures(model, texts, runs):
    argv = ["--models", model, *WANDA, "--calibration", texts[0]]
    assert sweep(*argv, *PASSED).status == 0
    folder = Path("runs/tiny/wanda-50-uk-seed0")
    before = results(folder)
    full = OSError(28, "No space left on device")
    with failing("tiny/wanda-50-uk-seed0", "prune", full):
        done = sweep(*argv, *PASSED, "--nsamples", 9)
    assert done.status == 1 and results(folder) == before
    assert "No space left" in json.loads((folder / "error.json").read_text("utf-8"))["error"]
    assert "| wanda" in done.out and "**Failed runs: 1**" in done.out
    runs.clear()
    assert sweep(*argv, *PASSED, "--nsamples", 9).status == 0
    assert not (folder / "error.json").exists() and results(folder)["settings"]["nsamples"] == 9


def test_a_model_that_changes_between_two_runs_is_read_again(model, texts, tmp_path):
    folder = shutil.copytree(model, tmp_path / "changing")
    other = tiny.write_model(tmp_path / "other", tiny.tiny_llama(seed=5))

    def change(event: str, _: int) -> None:
        if event == "run changing/wanda-50-uk-seed0":
            shutil.copy(other / "model.safetensors", folder)

    argv = ["--models", folder, *WANDA, "--calibration", texts[0]]
    with listening(change):
        assert sweep(*argv, *PASSED).status == 0
    pruned = ["--prune_method", "wanda", "--calibration_data", texts[0], *QUICK]
    assert call("--model", other, *pruned).status == 0
    swept = results("runs/changing/wanda-50-uk-seed0")
    assert swept["perplexity"] == results()["perplexity"]


def test_seeds_are_averaged_in_the_report_and_time_left_is_told(model, texts):
    argv = ["--models", model, *WANDA, "--calibration", texts[0], "--seeds", 0, 1, 2]
    done = sweep(*argv, *PASSED)
    assert done.status == 0
    row = next(line for line in done.out.splitlines() if line.startswith("| wanda"))
    assert "±" in row and "| 3 |" in " ".join(row.split())
    assert done.out.count("left") == 3  # not after the last one
    assert "±" in Path("runs/report.md").read_text(encoding="utf-8")
    for run in load_runs(["runs"]):
        assert "kept beside it" in run.results["peak_memory"]["of"]
        assert "perplexity uk" in (run.folder / "output.txt").read_text(encoding="utf-8")


# --- launch.sh, and languages compared


def test_recipes_hand_on_their_flags(tmp_path):
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    shown.chmod(0o755)
    by = partial(launched, folder=tmp_path, PYTHON=str(shown))
    recipes = {
        "unstructured": ["--prune_method", "sparsegpt"],
        "semistructured": [
            *["--prune_method", "sparsegpt", "--sparsity_type", "2:4"],
            "--replace_sparse_layers",
        ],
        "c4": ["--prune_method", "sparsegpt", "--prune_on_c4"],
        "dense": ["--eval_only"],
    }
    for name, flags in recipes.items():
        said = by([name, "a model", "--seed", "1"]).splitlines()
        ends = ["--save", f"out/{name}", "--seed", "1"]
        assert said == [str(ROOT / "main.py"), "--model", "a model", *flags, *ends]
    assert by(["sweep", "--models", "m"]).split() == "-P -m lib.sweep --models m".split()


def test_languages_prunes_twice_for_each_and_compares(model, texts, runs):
    done = sweep(model, *texts, "--out", "here", *PASSED, main=languages.main)
    assert done.status == 0, done
    pruned = [f"wanda-50-{name}-seed{seed}" for name in ("uk", "en") for seed in (0, 1)]
    assert runs == ["dense", *pruned]
    found = json.loads(Path("here/overlap/overlap.json").read_text(encoding="utf-8"))
    assert found["runs"] == ["uk (seed 0)", "en (seed 0)"]
    assert found["noise"] == ["uk (seed 1)", "en (seed 1)"]


@pytest.mark.parametrize(
    ("argv", "word"), [(["uk"], "SOURCE uk"), (["a", "b", "--method", "magnitude"], "no text")]
)
def test_languages_refuses_what_can_not_be_compared(model, argv, word):
    done = sweep(model, *argv, main=languages.main)
    assert done.status == 2 and word in done.complaints[0]
