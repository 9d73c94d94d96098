"""One command from a dense to a compressed model: its plan, its table, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from support import content, launched, results

from lib.commands import compress, compress_measure
from lib.run.flags import build_parser, check_flags
from lib.util.command import run

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_recovery_takes_the_time_that_the_other_steps_leave() -> None:
    tests = [{"tokens": 6_000, "seqlen": 512}, {"tokens": 4_000, "seqlen": 512}]
    dense = {"evaluation": tests, "seconds": {"eval": 10}}  # 1,000 tokens a second
    tokens = compress.recovery_tokens(dense, nsamples=32, seconds=600)
    fixed = 3 * 10_000 + 6 * 32 * 512 + 4 * 8 * 512
    left = 600 - (fixed + 5 * tokens) / 1000
    assert tokens % 512 == 0 and 0 <= left < 5 * 512 / 1000
    for seconds in (180, -5):  # less than 16 windows
        assert compress.recovery_tokens(dense, nsamples=32, seconds=seconds) == 0


@pytest.mark.parametrize("recovery", [[], ["--recover", "8192"]], ids=["pruned", "recovered"])
@pytest.mark.parametrize("target", compress.PLANS)
def test_main_takes_the_flags_of_every_plan(target: str, recovery: list[str]) -> None:
    parser = build_parser()
    plan = compress.PLANS[target].split()
    argv = ["--model", "m", "--prune_method", "admm", "--trim_vocabulary", *plan, *recovery]
    check_flags(parser, parser.parse_args(argv))


def test_a_model_is_compressed_and_compared(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 40, 8)
    Path("lib").mkdir()  # a folder of the user's, which hides no module
    flags = ["--data", "uk", "--recover", "1024", "--device", "cpu"]
    flags += ["--", "--nsamples", "8", "--prompts", "1"]
    out = launched(["compress", "dense", "small"], tmp_path, *flags)
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
    rows = {cells[1].strip(): cells[2:4] for cells in map(split, table.splitlines())}
    for name in ("on disk", "memory", "tokens a second", "bits per byte, uk"):
        dense, compressed = (cell.strip() for cell in rows[name])
        assert dense != compressed and "–" not in dense + compressed, name
    assert content("small")


def split(line: str) -> list[str]:
    return line.split("|")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--minutes", "inf"], "--minutes inf: must be above 0 and finite"),
        (["--minutes", "nan"], "--minutes nan: must be above 0 and finite"),
        (["--recover", "-5"], "--recover -5: must be at least 0"),
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


def test_what_a_model_takes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compress_measure.main([str(trained), "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["bytes"] == sum(
        (trained / name).stat().st_size
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    )
    assert figures["tokens_per_second"] > 0 and figures["memory"] > 10**8
    assert compress._measured(str(tmp_path), ["--device", "cpu"]) is None  # a line, not the end
    assert "can't be measured" in capsys.readouterr().err
