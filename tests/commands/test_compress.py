"""One command from a dense to a compressed model: its plan, its table, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from support import content, results

from lib.commands import compress, process
from lib.run.flags import build_parser, check_flags
from lib.util.command import run

pytestmark = pytest.mark.usefixtures("elsewhere", "in_this_process")


def test_recovery_takes_the_time_that_the_other_steps_leave() -> None:
    tests = [{"tokens": 6_000, "seqlen": 512}, {"tokens": 4_000, "seqlen": 512}]
    dense = {"evaluation": tests, "seconds": {"eval": 10}}  # 1,000 tokens a second
    dense |= {"flags": {"nsamples": 32}}
    tokens = compress.recovery_tokens(dense, seconds=600)
    fixed = 3 * 10_000 + 6 * 32 * 512 + 4 * 8 * 512
    left = 600 - (fixed + 5 * tokens) / 1000
    assert tokens % 512 == 0 and 0 <= left < 5 * 512 / 1000
    for seconds in (180, -5):  # less than 16 windows
        assert compress.recovery_tokens(dense, seconds=seconds) == 0


@pytest.mark.parametrize("recovery", [[], ["--recover", "8192"]], ids=["pruned", "recovered"])
@pytest.mark.parametrize("target", compress.PLANS)
def test_main_takes_the_flags_of_every_plan(target: str, recovery: list[str]) -> None:
    parser = build_parser()
    plan = compress.PLANS[target].split()
    argv = ["--model", "m", "--prune_method", "admm", "--trim_vocabulary", *plan, *recovery]
    check_flags(parser, parser.parse_args(argv))


def test_a_model_is_compressed_and_compared(trained: Path, capfd: pytest.CaptureFixture) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 40, 8)
    flags = ["--data", "uk", "--recover", "1024", "--device", "cpu"]
    assert run(compress.main, ["dense", "small", *flags, "--", "--nsamples", "8"]) == 0
    out = capfd.readouterr().out
    before, after = (results(f"out/compress/{name}") for name in ("dense", "compressed"))
    assert before["method"] == "dense" and 0.5 <= after["sparsity"]["overall"] < 0.51
    assert after["packed"]["bits"] == 4 and after["recovery"]["tokens"] == 1024
    assert (after["flags"]["seqlen"], after["flags"]["nsamples"]) == (128, 8)  # the model's own
    # the printed command is the whole of it
    line = next(line for line in out.splitlines() if "--prune_method" in line)
    argv = line.removeprefix("python main.py ").split()
    assert vars(build_parser().parse_args(argv)) == after["flags"]
    table = Path("out/compress/compressed.md").read_text("utf-8")
    assert table in out
    rows = {
        cells[1].strip(): cells[2:4] for cells in (row.split("|") for row in table.splitlines())
    }
    for name in ("on disk", "memory", "tokens a second", "bits per byte, uk"):
        dense, compressed = (cell.strip() for cell in rows[name])
        assert dense != compressed and "–" not in dense + compressed, name


def test_a_failed_measurement_is_a_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(compress, "call", lambda *_: 1)
    results = {"flags": {"cache_dir": None, "trust_remote_code": False}, "evaluation": []}
    args = compress._parser().parse_args(["dense", "small", "--data", "uk"])
    assert "| on disk | – | –" in " ".join(
        compress.comparison(args, results, results, "cpu").split()
    )
    assert "small: its size and speed can't be measured" in capsys.readouterr().err


def test_commands_start_from_any_folder(capfd: pytest.CaptureFixture) -> None:
    Path("lib").mkdir()  # a folder of the user's, which hides no module
    Path("lib/__init__.py").touch()
    assert process.call("lib.commands.ubertext", "--help") == 0
    assert process.call("lib.commands.ubertext", "nowhere", "new") == 1
    assert "FOLDER_OF_DUMPS nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes: 0: must be at least 1"),
        (["--recover", "3"], "--recover 3: less than one step"),
        (["--save", "mine/thesis.txt"], "--save mine/thesis.txt: is a file"),
        (["--for", "llama.cpp"], "small.gguf exists; name another OUT"),
        (["--", "--pack_bits", "5"], "--pack_bits"),
        (["--", "--resume", ""], "--resume"),
        (["--", "--save_model", "mine"], "--save_model mine"),
        (["--", "--nsamples", "99"], "can give only"),
    ],
)
def test_mistakes_end_it_before_the_model_is_measured(
    flags: list[str], message: str, capfd: pytest.CaptureFixture
) -> None:
    tiny.write_model("dense")
    tiny.write_texts("uk", 40, 4)
    Path("mine").mkdir()
    for file in ("mine/thesis.txt", "small.gguf"):
        Path(file).write_text("mine")
    before = content(".")
    argv = ["dense", "small", "--data", "uk", "--device", "cpu", *flags]
    try:
        status = run(compress.main, argv)
    except SystemExit as left:
        status = left.code
    assert status in (1, 2)
    assert message in capfd.readouterr().err
    assert content(".") == before
