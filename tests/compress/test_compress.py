"""One command from a dense to a compressed model: its plan, its table, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from support import content, launched, results

from lib.compress import compress, plan
from lib.run.flag_checks import check_flags
from lib.run.flags import build_parser
from lib.util.command import run
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

FAST = plan.Budget(seconds=600, tokens_per_second=1000, test_tokens=10_000, nsamples=32, seqlen=512)


def test_recovery_takes_the_time_that_the_other_steps_leave() -> None:
    tokens = FAST.recovery_tokens()
    assert tokens % FAST.seqlen == 0
    fixed = plan.EVALUATIONS * 10_000 + plan.PRUNING_PASSES * 32 * 512
    fixed += plan.ALLOCATION_PASSES * plan.ALLOCATION_WINDOWS * 512
    left = 600 - (fixed + plan.RECOVERY_PASSES * tokens) / 1000
    assert 0 <= left < plan.RECOVERY_PASSES * 512 / 1000
    assert plan.Budget(**vars(FAST) | {"seconds": 100}).recovery_tokens() == 0
    assert plan.Budget(**vars(FAST) | {"seconds": -5}).recovery_tokens() == 0


@pytest.mark.parametrize("tokens", [0, 8192])
@pytest.mark.parametrize("target", plan.TARGETS)
def test_main_takes_the_flags_of_every_plan(target: str, tokens: int) -> None:
    parser = build_parser()
    args = parser.parse_args(["--model", "m", *plan.flags(target, tokens)])
    check_flags(parser, args)
    assert args.trim_vocabulary and args.prune_method == "admm"
    assert args.recover == (tokens or None)


def test_a_cpu_takes_few_and_short_windows_and_what_is_asked_for_instead() -> None:
    def windows(device: str, longest: int, *passed_on: str) -> tuple[int, int | None]:
        flags = [*plan.windows(device, longest), "--device", device, *passed_on]
        args = build_parser().parse_args(["--model", "m", *flags])
        return args.nsamples, args.seqlen

    assert windows("cpu", 32_768) == (32, 512)
    assert windows("cpu", 256) == (32, 256)
    assert windows("cpu", 256, "--seqlen", "64") == (32, 64)
    assert windows("cuda:0", 32_768) == (128, None)  # main.py's own


def test_a_model_is_compressed_and_compared(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 40, 8)
    flags = ["--data", "uk", "--recover", "1024", "--device", "cpu"]
    flags += ["--", "--nsamples", "8", "--prompts", "1"]
    out = launched(["compress", "dense", "small"], tmp_path, *flags)
    assert "--nsamples 32 --seqlen 128 --device" in out  # as long as the model's windows can be
    dense, small = results("out/compress/dense"), results("out/compress/compressed")
    assert dense["method"] == "dense" and 0.5 <= small["sparsity"]["overall"] < 0.51
    assert small["packed"]["bits"] == 4 and small["recovery"]["tokens"] == 1024
    # the printed command is the whole of it: it gives the same model
    line = next(line for line in out.splitlines() if "--prune_method" in line)
    assert "--allocation error" in line and "--save_model small" in line
    table = Path("out/compress/compressed.md").read_text("utf-8")
    assert table in out and "| bits per byte, uk " in table
    sizes = next(line for line in table.splitlines() if line.startswith("| on disk"))
    before, after = (cell.strip() for cell in sizes.split("|")[2:4])
    assert before != after
    assert Path("out/compress/compressed.png").stat().st_size > 10_000
    assert content("small")


def test_the_time_that_is_left_is_what_minutes_give_at_the_dense_models_speed() -> None:
    dense = {"evaluation": [{"tokens": 600, "seqlen": 32}, {"tokens": 400, "seqlen": 32}]}
    settings = build_parser().parse_args(["--model", "m", "--eval_only", "--nsamples", "8"])
    budget = compress._budget(dense | {"seconds": {"eval": 0.5}}, 60, settings)
    assert budget == plan.Budget(
        seconds=60, tokens_per_second=2000, test_tokens=1000, nsamples=8, seqlen=32
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--", "--pack_bits", "5"], "--pack_bits"),
        (["--", "--resume", ""], "--resume"),
    ],
)
def test_mistakes_end_it_before_the_model_is_measured(
    flags: list[str], message: str, capfd
) -> None:
    tiny.write_model("dense")
    tiny.write_texts("uk", 4, 4)
    try:
        status = run(compress.main, ["dense", "small", "--data", "uk", "--device", "cpu", *flags])
    except SystemExit as left:
        status = left.code
    assert status in (1, 2)
    assert message in capfd.readouterr().err
    assert not Path("out").exists()


def test_a_model_that_cant_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing-here: its speed can't be measured"):
        compress.measured([tmp_path / "nothing-here"], "cpu")
