"""Many runs by one command: which there are, which are done again, and that each is as if alone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from processes import Worker
from support import QUICK, call, children, results, wait_until

from lib.commands import sweep, sweep_run
from lib.run.flags import build_parser

pytestmark = pytest.mark.usefixtures("elsewhere", "in_this_process")
WANDA = ["--methods", "wanda", "--types", "unstructured"]
PASSED = ["--", *QUICK]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    english = tiny.sentences(20, seed=9)
    return tiny.write_texts(folder / "uk"), tiny.write_texts(folder / "en", english, english[:8])


def planned(*argv: object, passed_on: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the flags of main.py of every run by name."""
    args = sweep.build_sweep_parser().parse_args([str(part) for part in argv])
    return sweep.plan(args, passed_on)


# --- which runs there are


def test_the_product_leaves_out_what_makes_no_sense(texts) -> None:
    uk, en = texts
    names = planned(
        *["--models", "a/one", "two", "--methods", "magnitude", "wanda"],
        *["--types", "unstructured", "4:8", "neurons", "--ratios", 0.5, 0.7],
        *["--calibration", uk, f"{uk}=0.75,{en}=0.25", "--seeds", 0, 3],
    )
    settings = ["50", "70", "4of8", "50-neurons", "70-neurons"]
    drawn = [f"{text}-seed{seed}" for text in ("uk", "uk=0.75+en=0.25") for seed in (0, 3)]
    each = ["dense", *(f"magnitude-{setting}" for setting in settings)]
    each += [f"wanda-{setting}-{text}" for setting in settings for text in drawn]
    assert list(names) == [f"{folder}/{name}" for folder in ("one", "two") for name in each]


def test_neurons_are_left_out_for_methods_that_have_no_rule_for_them(texts) -> None:
    names = planned("--models", "m", "--types", "neurons", "--calibration", texts[0])
    assert names and not any("ria" in name for name in names)


def test_methods_of_ones_own(model, texts, tmp_path, capsys) -> None:
    code = "from langprune.methods.wanda import Wanda\nclass Mine(Wanda):\n"
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "mine.py").write_text(f"{code}    name = {parent!r}\n")
    argv = ["--models", model, "--calibration", texts[0], "--types", "unstructured", "--methods"]
    runs = planned(*argv, f"{tmp_path}/a/mine.py:Mine", "wanda", passed_on=QUICK)
    assert list(runs)[1:] == ["tiny/Mine-50-uk-seed0", "tiny/wanda-50-uk-seed0"]
    of_mine = build_parser().parse_args(runs["tiny/Mine-50-uk-seed0"])
    Path(of_mine.save).mkdir(parents=True)
    sweep_run.run(of_mine, tmp_path / "shared")
    assert capsys.readouterr().out.startswith(f"{of_mine.save}: uk ")
    assert results(Path(of_mine.save))["method"] == "Mine"
    twice = planned(*argv, "a/mine.py:Mine", "b/mine.py:Mine")
    assert list(twice)[1:] == [f"tiny/{parent}_mine.py_Mine-50-uk-seed0" for parent in "ab"]
    refused = call(*argv, "mine.py", program=sweep.main)
    assert refused.status == 2 and "or FILE.py:CLASS" in refused.complaints[-1]


def test_flags_of_a_run(texts) -> None:
    uk, en = texts
    argv = ["--models", "m", *WANDA, "--calibration", f"{uk}=3,{en}=1", "--out", "o", "--seeds", 5]
    passed_on = ["--nsamples", "7", "--resume", "r", "--trim_vocabulary", "--recover", "999"]
    passed_on += ["--recover_ce_weight", "0.5", "--allocation", "error", "--replace_sparse_layers"]
    runs = planned(*argv, "--save_models", passed_on=[*passed_on, "--quantize", "int4"])
    dense, wanda = map(build_parser().parse_args, runs.values())
    assert dense.eval_only and not dense.save_model and not dense.resume
    assert (dense.recover, dense.allocation, dense.nsamples) == (None, "uniform", 7)
    assert not dense.replace_sparse_layers and dense.quantize is None
    assert dense.eval_data == wanda.eval_data == [str(uk), str(en)]
    assert wanda.calibration_data == [f"{uk}=3", f"{en}=1"]
    assert (wanda.seed, wanda.sparsity_ratio, wanda.nsamples) == (5, 0.5, 7)
    assert (wanda.recover, wanda.recover_ce_weight, wanda.quantize) == (999, 0.5, "int4")
    name = "m/wanda-50-uk=0.75+en=0.25-seed5"
    assert wanda.save == f"o/{name}" and wanda.save_model == f"o/{name}/model"
    assert wanda.resume == f"r/{name}"  # finished blocks of two runs do not meet
    assert dense.vocabulary_data == wanda.vocabulary_data == [str(uk), str(en)]


def test_flags_of_prunings_alone_are_left_out_for_the_dense_model(texts) -> None:
    """Each pruning writes a mask file of its own, whether the file is passed on or varied."""
    argv = ["--models", "m", "--methods", "ria", "--types", "unstructured", "--calibration"]
    argv += [texts[0], "--save_models", "--vary", "method_args=alpha=0.3,alpha=0.4"]
    passed_on = ["--text_only", "--save_masks", "k/masks.safetensors", "--offload_folder", "away"]
    dense, *pruned = map(build_parser().parse_args, planned(*argv, passed_on=passed_on).values())
    assert dense.method_args is dense.save_masks is dense.save_model is None
    assert not dense.text_only and dense.offload_folder == "away/m/dense"
    assert [each.method_args for each in pruned] == [["alpha=0.3"], ["alpha=0.4"]]
    names = [f"m/ria-50-method_args=alpha=0.{each}-uk-seed0" for each in (3, 4)]
    assert [each.save_masks for each in pruned] == [f"k/{name}/masks.safetensors" for name in names]
    assert all(each.text_only and each.save_model for each in pruned)
    varied = [*argv[:-2], "--vary", "save_masks=a,b"]
    runs = planned(*varied, passed_on=["--method_args", "alpha=0.3"])
    parsed = [build_parser().parse_args(flags) for flags in runs.values()]
    names = [f"m/ria-50-save_masks={each}-uk-seed0/{each}" for each in "ab"]
    assert [each.save_masks for each in parsed] == [None, *names]


def test_any_flag_is_varied(texts) -> None:
    """The dense model has runs for what its figures depend on; what decides nothing is left out."""
    argv = ["--models", "m", "--methods", "magnitude", "wanda", "--types", "unstructured"]
    argv += ["--calibration", texts[0], "--vary", "nsamples=2,4", "--vary", "eval_windows=3,5"]
    runs = planned(*argv, "--vary", "use_variant=off")
    windows = ["eval_windows=3", "eval_windows=5"]
    names = [f"dense-{each}" for each in windows]
    names += [f"magnitude-50-{each}-use_variant=off" for each in windows]
    names += [
        f"wanda-50-nsamples={count}-{each}-use_variant=off-uk-seed0"
        for count in (2, 4)
        for each in windows
    ]
    assert list(runs) == [f"m/{name}" for name in names]
    parsed = [build_parser().parse_args(flags) for flags in runs.values()]
    assert [each.eval_windows for each in parsed] == [3, 5] * 4
    assert [each.nsamples for each in parsed[4:]] == [2, 2, 4, 4]
    once = planned(*argv[:-2], "--vary", "allocation=error,uniform")
    assert [name for name in once if "magnitude" not in name and "wanda" not in name] == ["m/dense"]
    textless = [name for name in once if name.startswith("m/magnitude-50-allocation")]
    assert textless == ["m/magnitude-50-allocation=uniform"]  # with errors it reads text


def test_sets_and_models_of_one_name_get_folders_of_their_own(tmp_path: Path) -> None:
    for parent in "ab":
        tiny.write_texts(tmp_path / parent / "uk", 1, 1)
    names = planned("--models", "x/m", "y/m", *WANDA, "--calibration", "a/uk", "b/uk")
    prunings = ["dense", "wanda-50-a_uk-seed0", "wanda-50-b_uk-seed0"]
    assert list(names) == [f"{model}/{name}" for model in ("x_m", "y_m") for name in prunings]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--ratios", "1.5"], 2, ["--sparsity_ratio 1.5"]),
        (["--", "--prune_method=wanda"], 2, ["--prune_method after '--'"]),
        (["--", "--nosuch"], 2, ["--nosuch"]),
        (["--methods", "magnitude", "--", "--use_variant"], 2, ["--use_variant", "wanda"]),
        (["--calibration", "no/such/folder"], 1, ["--calibration no/such/folder"]),
        (["--calibration", "c4=-1,ubertext=1"], 1, ["--calibration c4=-1", "above 0"]),
        (["--eval_data", "no/such/folder"], 1, ["--eval_data no/such/folder"]),
        (["--vary", "nosuch=1"], 1, ["--vary nosuch=1", "nsamples=8,32"]),
        (["--vary", "seed=1,2"], 1, ["--vary seed=1,2", "flags of sweep"]),
        (["--vary", "use_variant=1"], 1, ["use_variant=on,off"]),
        (["--vary", "nsamples=0"], 2, ["--nsamples", "at least 1"]),
        (["--vary", "nsamples=2", "--", "--nsamples", "3"], 1, ["also given after '--'"]),
        (["--ratios", "0.5", "0.5"], 1, ["--out", "-50-ubertext-seed0", "twice"]),
        (["--out", "thesis.txt"], 1, ["--out thesis.txt: it is a file"]),
    ],
)
def test_a_mistake_is_told_before_the_first_run(model, argv, status, words) -> None:
    Path("thesis.txt").write_text("mine")
    said = call("--models", model, *argv, program=sweep.main)
    assert said.status == status and not Path("runs").exists()
    assert len(said.complaints) == 1
    assert all(word in said.complaints[0] for word in words), said.complaints


# --- each run is as if alone; failed ones are recorded and tried again, finished ones kept


def test_runs_are_as_if_alone_and_a_failure_does_not_stop_the_rest(model, texts, tmp_path) -> None:
    few = tiny.write_texts(tmp_path / "few", tiny.sentences(1, words=16), 8)
    Path("runs/.dense-states").mkdir(parents=True)  # of a sweep that was killed
    argv = ["--models", model, *WANDA, "--save_models", "--eval_data", few, texts[0]]
    first = call(*argv, "--calibration", few, texts[0], *PASSED, program=sweep.main)
    assert first.status == 1
    failed, finished = Path("runs/tiny/wanda-50-few-seed0"), Path("runs/tiny/wanda-50-uk-seed0")
    assert first.complaints[-1].startswith("error: 1 of 3 runs failed: tiny/wanda-50-few-seed0.")
    assert f"{failed}: failed with status 1" in first.out
    assert any("too few for 8 windows" in line for line in first.complaints)
    assert "[3/3] tiny/wanda-50-uk-seed0, about " in first.out
    assert f"{finished}: few " in first.out and not list(Path("runs").glob(".*"))
    assert "perplexity uk" in (finished / "output.txt").read_text("utf-8")

    own = ["--model", model, "--prune_method", "wanda", "--calibration_data", texts[0], *QUICK]
    assert (
        call(*own, "--eval_data", few, texts[0], "--save", "out", "--save_model", "m").status == 0
    )
    for key in ("perplexity", "evaluation", "sparsity", "calibration"):
        assert results(finished)[key] == results()[key], key
    weights = "model.safetensors"
    assert Path("m", weights).read_bytes() == (finished / "model" / weights).read_bytes()

    tiny.write_texts(few, 20, 8)
    second = call(*argv, "--calibration", few, *PASSED, program=sweep.main)
    assert second.status == 0
    assert "runs/tiny/dense: finished before" in second.out
    assert results(failed)["perplexity"]
    assert Path("runs/report.md").read_text("utf-8").count("\n| wanda ") == 2


def test_a_run_is_done_again_where_what_stands_behind_a_flag_changed(texts, capsys) -> None:
    """One word of a text, one shard of the weights: no number of before is shown as today's."""
    llama = tiny.write_model(Path("llama"), tiny.tiny_llama(seed=1))
    uk = shutil.copytree(texts[0], Path("uk"))
    folder, shared = Path("runs/llama/wanda"), Path("shared")
    argv = ["--model", str(llama), "--prune_method", "wanda", "--calibration_data", str(uk), *QUICK]
    argv += ["--save", str(folder), "--save_model", str(folder / "model")]
    for path in (folder / "model", shared):
        path.mkdir(parents=True)

    def said(*more: str) -> str:
        sweep_run.run(build_parser().parse_args([*argv, *more]), shared)
        return capsys.readouterr().out

    (folder / "model/thesis.txt").touch()  # it is no model of a sweep
    for _ in range(2):
        with pytest.raises(Exception, match="holds thesis.txt"):
            said()
    (folder / "model/thesis.txt").unlink()
    assert said().startswith(f"{folder}: uk ")
    before = results(folder)
    with pytest.raises(Exception, match="too few for 900 windows"):
        said("--nsamples", "900")
    assert results(folder) == before and (folder / "model/config.json").is_file()
    assert said("--cache_dir", "x") == f"{folder}: finished before\n"
    assert "--batch_size was 32, is 3; it is run again" in said("--batch_size", "3")
    assert "--nsamples was 8, is 9; it is run again" in said("--nsamples", "9")
    assert results(folder)["flags"]["nsamples"] == 9
    file = uk / "test.jsonl"
    file.write_text(file.read_text("utf-8").replace("ріка", "гора", 40), "utf-8")
    assert "windows of --eval_data" in said("--nsamples", "9")
    assert len(list(shared.iterdir())) == 3  # for either test text, and for another batch size
    other = tiny.write_model(Path("other"), tiny.tiny_llama(seed=2))
    shutil.copy(other / "model.safetensors", llama)  # of the same size
    assert "weights of --model was" in said("--nsamples", "9")
    assert len(list(shared.iterdir())) == 4  # models of one shape do not share
    shutil.rmtree(folder / "model")
    assert "its model is missing" in said("--nsamples", "9")
    masks = ["--save_masks", str(folder / "masks.safetensors")]
    assert "its masks are missing" in said("--nsamples", "9", *masks)
    assert "finished before" in said("--nsamples", "9", *masks)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_killed_runs_and_sweeps(model, texts, tmp_path) -> None:
    """A run that is killed is a failed one; Ctrl-C ends both; one whose sweep is killed ends."""

    def watches(run: int) -> bool:
        """Whether a run is up to watching its sweep; a signal before its exec would be lost."""
        return len(os.listdir(f"/proc/{run}/task")) > 1

    def started() -> tuple[Worker, int, int]:
        """Start the sweep; return it, and its process and that of its first run."""
        argv = ["--models", model, *WANDA, "--calibration", texts[0], *PASSED]
        worker = Worker([argv], tmp_path, program="lib.commands.sweep")
        wait_until(lambda: children(worker.process.pid))
        return worker, worker.process.pid, children(worker.process.pid)[0]

    worker, process, run = started()
    os.kill(run, signal.SIGKILL)
    wait_until(lambda: [each for each in children(process) if each != run])
    (run,) = children(process)
    wait_until(lambda: watches(run))
    for each in (process, run):  # as a terminal does
        os.kill(each, signal.SIGINT)
    done = worker.end()
    assert done.status == 130
    assert done.err.splitlines()[-1] == "interrupted; the same command continues"
    assert "runs/tiny/dense: failed with status -9" in done.out

    worker, process, run = started()
    wait_until(lambda: watches(run))
    os.kill(process, signal.SIGKILL)
    worker.end()
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert not list(Path("runs").rglob("results.json"))
