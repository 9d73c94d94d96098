"""Many runs by one command: which there are, which are done again, and that each is as if alone."""

from __future__ import annotations

import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from processes import Worker
from support import QUICK, Done, call, children, program_of, results, succeed, wait_until

from lib.run.flags import build_parser
from lib.util.processes import main_of

pytestmark = pytest.mark.usefixtures("elsewhere")
WANDA = ["--methods", "wanda", "--types", "unstructured"]
PASSED = ["--", *QUICK]
Planned = Callable[..., dict[str, Namespace]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    english = tiny.sentences(20, seed=9)
    return tiny.write_texts(folder / "uk"), tiny.write_texts(folder / "en", english, english[:8])


def sweep(*argv: object) -> Done:
    return call(*argv, program=program_of("sweep"))


# --- which runs there are


@pytest.fixture
def planned(replace_call: Callable) -> Planned:
    """Returns the flags of main.py of every run, by its name, of a sweep that runs none."""

    def plan(*argv: object) -> dict[str, Namespace]:
        started = []
        replace_call(lambda module, *words: started.append((module, [*map(str, words)])) or 1)
        done = sweep("--out", "o", *argv)
        assert started, done.err
        shutil.rmtree("o")
        of_runs = [words for module, words in started if module == "commands.sweep.run"]
        parsed = [build_parser().parse_args(each[each.index("--") + 1 :]) for each in of_runs]
        return {each.save.removeprefix("o/"): each for each in parsed}

    return plan


def test_the_product_leaves_out_what_makes_no_sense(texts, planned: Planned) -> None:
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
    without_rule = planned("--models", "m", "--types", "neurons", "--calibration", uk)
    assert without_rule and not any("ria" in name for name in without_rule)


def test_names_are_told_apart(texts, tmp_path: Path, planned: Planned) -> None:
    """Models, texts and methods of one name get folders of their own."""
    for parent in "ab":
        tiny.write_texts(tmp_path / parent / "uk", 1, 1)
        code = "from langprune.methods.wanda import Wanda\nclass Mine(Wanda):\n"
        Path(parent, "mine.py").write_text(f"{code}    name = {parent!r}\n")
    names = planned("--models", "x/m", "y/m", *WANDA, "--calibration", "a/uk", "b/uk")
    prunings = ["dense", "wanda-50-a_uk-seed0", "wanda-50-b_uk-seed0"]
    assert list(names) == [f"{model}/{name}" for model in ("x_m", "y_m") for name in prunings]
    argv = ["--models", "m", "--calibration", texts[0], "--types", "unstructured", "--methods"]
    names = planned(*argv, "a/mine.py:Mine", "b/mine.py:Mine")
    assert list(names)[1:] == [f"m/{parent}_mine.py_Mine-50-uk-seed0" for parent in "ab"]
    names = planned(*argv, "a/mine.py:Mine", "wanda")
    assert list(names)[1:] == ["m/Mine-50-uk-seed0", "m/wanda-50-uk-seed0"]


def test_flags_of_a_run(texts, planned: Planned) -> None:
    uk, en = texts
    argv = ["--models", "m", *WANDA, "--calibration", f"{uk}=3,{en}=1", "--seeds", 5]
    passed_on = ["--nsamples", "7", "--resume", "r", "--recover", "999"]
    passed_on += ["--recover_ce_weight", "0.5", "--allocation", "error", "--replace_sparse_layers"]
    runs = planned(*argv, "--save_models", "--", *passed_on, "--quantize", "int4")
    dense, wanda = runs.values()
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


def test_any_flag_is_varied(texts, planned: Planned) -> None:
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
    assert [each.eval_windows for each in runs.values()] == [3, 5] * 4
    assert [each.nsamples for each in runs.values()][4:] == [2, 2, 4, 4]
    once = planned(*argv[:-2], "--vary", "allocation=error,uniform")
    assert [name for name in once if "magnitude" not in name and "wanda" not in name] == ["m/dense"]
    textless = [name for name in once if name.startswith("m/magnitude-50-allocation")]
    assert textless == ["m/magnitude-50-allocation=uniform"]  # with errors it reads text


# --- each run is as if alone; failed ones are recorded and tried again, finished ones kept


@pytest.mark.usefixtures("in_this_process")
def test_runs_are_as_if_alone_and_a_failure_does_not_stop_the_rest(model, texts, tmp_path) -> None:
    few = tiny.write_texts(tmp_path / "few", tiny.sentences(1, words=16), 8)
    Path("runs/.dense-states").mkdir(parents=True)  # of a sweep that was killed
    argv = ["--models", model, *WANDA, "--save_models", "--eval_data", few, texts[0]]
    first = sweep(*argv, "--calibration", few, texts[0], *PASSED)
    failed, finished = Path("runs/tiny/wanda-50-few-seed0"), Path("runs/tiny/wanda-50-uk-seed0")
    assert first.status == 1 and "tiny/wanda-50-few-seed0" in first.complaints[-1]
    assert f"{failed}: failed with status 1" in first.out
    assert f"{finished}: few " in first.out and not list(Path("runs").glob(".*"))
    missing = f"1 of 3 runs are not finished: {failed}."
    assert missing in first.out and missing in Path("runs/report.md").read_text("utf-8")
    assert "perplexity uk" in (finished / "output.txt").read_text("utf-8")

    own = ["--model", model, "--prune_method", "wanda", "--calibration_data", texts[0], *QUICK]
    succeed(*own, "--eval_data", few, texts[0], "--save", "out", "--save_model", "m")
    for key in ("perplexity", "evaluation", "sparsity", "calibration"):
        assert results(finished)[key] == results()[key], key
    weights = "model.safetensors"
    assert Path("m", weights).read_bytes() == (finished / "model" / weights).read_bytes()

    tiny.write_texts(few, 20, 8)
    second = sweep(*argv, "--calibration", few, *PASSED)
    assert second.status == 0
    assert "runs/tiny/dense: finished before" in second.out
    assert results(failed)["perplexity"]
    after = Path("runs/report.md").read_text("utf-8")
    assert after.count("\n| wanda ") == 2 and "not finished" not in after


def test_a_run_is_done_again_where_what_stands_behind_a_flag_changed(texts, capsys) -> None:
    """One word of a text, one shard of the weights: no number of before is shown as today's."""
    llama = tiny.write_model(Path("llama"), tiny.tiny_llama(seed=1))
    uk = shutil.copytree(texts[0], Path("uk"))
    folder, shared = Path("runs/llama/wanda"), Path("shared")
    argv = ["--model", str(llama), "--prune_method", "wanda", "--calibration_data", str(uk), *QUICK]
    argv += ["--save", str(folder), "--save_model", str(folder / "model")]
    for path in (folder / "model", shared):
        path.mkdir(parents=True)

    def run(*more: object) -> Done:
        return call(shared, "--", *argv, *more, program=main_of("commands.sweep.run"))

    def again(*more: object) -> str:
        """Why the run is done again; the empty text where it is not."""
        done = run(*more)
        assert done.status == 0, done.err
        reason = done.out.splitlines()[0].removeprefix(f"{folder}: ")
        return "" if reason == "finished before" else reason

    (folder / "model/thesis.txt").touch()  # it is no model of a sweep
    for _ in range(2):
        assert "holds thesis.txt" in run().err
    (folder / "model/thesis.txt").unlink()
    assert again().startswith("uk ")
    before = results(folder)
    assert "too few for 900 windows" in run("--nsamples", 900).err
    assert results(folder) == before and (folder / "model/config.json").is_file()
    assert not again("--cache_dir", "x")
    assert again("--batch_size", 3).startswith("--batch_size ")
    assert again("--nsamples", 9).startswith("--nsamples ")
    assert results(folder)["flags"]["nsamples"] == 9
    file = uk / "test.jsonl"
    file.write_text(file.read_text("utf-8").replace("ріка", "гора", 40), "utf-8")
    assert again("--nsamples", 9).startswith("windows of --eval_data")
    assert len(list(shared.iterdir())) == 3  # for either test text, and for another batch size
    other = tiny.write_model(Path("other"), tiny.tiny_llama(seed=2))
    shutil.copy(other / "model.safetensors", llama)  # of the same size
    assert again("--nsamples", 9).startswith("weights of --model")
    assert len(list(shared.iterdir())) == 4  # models of one shape do not share
    shutil.rmtree(folder / "model")
    assert "model" in again("--nsamples", 9) and (folder / "model/config.json").is_file()


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_killed_runs_and_sweeps(model, texts, tmp_path) -> None:
    """A run that is killed is a failed one; Ctrl-C ends both; one whose sweep is killed ends."""

    def watches(run: int) -> bool:
        """Whether a run is up to watching its sweep; a signal before its exec would be lost."""
        return len(os.listdir(f"/proc/{run}/task")) > 1

    def started() -> tuple[Worker, int, int]:
        """Start the sweep; return it, and its process and that of its first run."""
        argv = ["--models", model, *WANDA, "--calibration", texts[0], *PASSED]
        worker = Worker([argv], tmp_path, program="lib.commands.sweep.__main__")
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
    said = [line for line in done.err.splitlines() if "interrupted" in line]
    assert done.status == 130 and said == ["interrupted; the same command continues"]
    assert "runs/tiny/dense: failed with status -9" in done.out

    worker, process, run = started()
    wait_until(lambda: watches(run))
    os.kill(process, signal.SIGKILL)
    worker.end()
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert not list(Path("runs").rglob("results.json"))
