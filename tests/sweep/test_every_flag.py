"""Every flag that a run of main.py takes can follow the `--` of a sweep, and reaches its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from support import QUICK, results

from lib.run.flags import FLAGS
from lib.sweep import sweep as command_of_sweep
from lib.sweep.plan import plan

pytestmark = pytest.mark.usefixtures("elsewhere")
# a value for every flag, in sweeps of flags that go together
SWEEPS = {
    "plain": {
        "cache_dir": ["weights"],
        "device": ["cpu"],
        "dtype": ["bfloat16"],
        "seqlen": ["16"],
        "bos": ["never"],
        "batch_size": ["3"],
        "timeout": ["5"],
        "trust_remote_code": [],
        "nsamples": ["7"],
        "allocation": ["error"],
        "blend": ["0.5"],
        "prompts": ["1"],
        "abilities": [],
        "pairs": ["pairs.jsonl"],
        "fidelity": [],
        "depth": [],
        "tasks": ["arc_easy"],
        "include_path": ["uk"],
        "card_without_prompts": [],
        "resume": ["blocks"],
        "resume_anyway": [],
        "debug": [],
    },
    "neurons": {"neurons_multiple": ["16"]},
    "quantised": {"load_bit": ["8"]},
    "offloaded": {"offload": ["away"], "use_variant": []},
    "trimmed and packed": {
        "trim_vocabulary": [],
        "vocabulary_data": ["uk"],
        "vocabulary_size": ["300"],
        "vocabulary_minimum": ["2"],
        "keep_reserved_tokens": [],
        "replace_sparse_layers": [],
        "pack_bits": ["8"],
        "rounding": ["hessian"],
        "pack_embeddings": ["8"],
    },
    "recovered": {
        "recover": ["64"],
        "recover_rank": ["4"],
        "recover_rate": ["0.001"],
        "recover_ce": ["0.5"],
    },
}
NEVER = {"teacher"}  # a sweep prunes, and then the model itself is the teacher
METHODS = ["--methods", "wanda", "admm", "magnitude"]


@pytest.fixture
def argv() -> list[str]:
    tiny.write_model("model")
    tiny.write_texts("uk")
    Path("pairs.jsonl").write_text('{"good": "one", "bad": "two"}', "utf-8")
    return ["--models", "model", *METHODS, "--types", "unstructured", "--calibration", "uk"]


def test_these_sweeps_have_every_flag() -> None:
    given = {name for flags in SWEEPS.values() for name in flags}
    assert given | NEVER == {name for name, flag in FLAGS.items() if flag.in_sweep}


@pytest.mark.parametrize("flags", SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_with_every_flag(
    flags: dict[str, list[str]], argv: list[str], harness: None
) -> None:
    if "neurons_multiple" in flags:
        argv += ["--types", "neurons", "--ratios", "0.25"]
    passed = [*QUICK, *(word for name, value in flags.items() for word in (f"--{name}", *value))]
    command_of_sweep.sweep(argv, passed)
    runs = plan(command_of_sweep.build_sweep_parser().parse_args(argv), passed)
    for name in flags:
        assert any(FLAGS[name].is_given(run.args) for run in runs), name
    for run in runs:
        assert results(run.folder)["perplexity"], run.name


def test_flags_go_to_the_runs_that_they_fit(argv: list[str]) -> None:
    def runs_with(*flags: str, types: tuple[str, ...] = ("unstructured",)) -> set[str]:
        name = flags[0].removeprefix("--")
        given = [*argv, "--types", *types]
        runs = plan(command_of_sweep.build_sweep_parser().parse_args(given), flags)
        return {run.name.partition("/")[2] for run in runs if FLAGS[name].is_given(run.args)}

    drawn = {f"{method}-50-uk-seed0" for method in ("wanda", "admm", "magnitude")}
    assert runs_with("--allocation", "error", types=("unstructured", "2:4")) == drawn
    assert runs_with("--allocation", "owl") == drawn - {"magnitude-50-uk-seed0"}
    assert runs_with("--blend", "0.5") == {"admm-50-uk-seed0"}
    assert runs_with("--use_variant") == {"wanda-50-uk-seed0"}
    assert runs_with("--recover_rank", "4", "--recover", "64") == drawn
    assert runs_with("--dtype", "bfloat16") == {"dense", "magnitude-50"} | (
        drawn - {"magnitude-50-uk-seed0"}
    )


def test_magnitude_reads_the_sweeps_texts_where_the_allocation_does(argv: list[str]) -> None:
    runs = plan(command_of_sweep.build_sweep_parser().parse_args(argv), ["--allocation", "error"])
    assert {tuple(run.args.calibration_data) for run in runs if run.args.prune_method} == {("uk",)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recover_rank", "4"], ["--recover_rank after '--'", "is for --recover"]),
        (["--teacher", "big"], ["--teacher after '--'", "is for --recover"]),
        (["--teacher", "big", "--recover", "64"], ["--teacher big", "--prune_method"]),
    ],
)
def test_flags_that_fit_no_run(
    flags: list[str], words: list[str], argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as left:
        plan(command_of_sweep.build_sweep_parser().parse_args(argv), flags)
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words), line


def test_a_sweep_of_methods_that_do_not_have_a_flag(
    argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    given = command_of_sweep.build_sweep_parser().parse_args([*argv, "--methods", "magnitude"])
    with pytest.raises(SystemExit):
        plan(given, ["--blend", "0.5"])
    assert "fits none of the runs (--blend 0.5: is for admm" in capsys.readouterr().err
    assert not Path("runs").exists()
