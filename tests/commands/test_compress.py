"""One command from a dense to a small model: its plan, what it makes, going on, what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import chats
import pytest
import tiny
from huggingface_hub import metadata_load
from processes import Worker
from support import children, content, results, wait_until

from lib.commands import compress, dialogues
from lib.data.documents import read_documents
from lib.run.flags import build_parser, check_flags
from lib.run.plan import Plan
from lib.run.texts import named_sources
from lib.util.command import CALLED, call, run, typed
from lib.util.files import exclusive_lock

pytestmark = pytest.mark.usefixtures("elsewhere", "in_this_process")


@pytest.fixture(autouse=True)
def without_a_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "find_spec", lambda name: None)


def test_the_minutes_are_kept() -> None:
    spent = {"load": 2, "dense": 0.2, "measure before": 2.0, "recover": 5.2, "eval": 0.2}
    spent["completions"] = 1
    rehearsal = {
        "seconds": spent,
        "recovery": {"tokens": 1024, "curve": [{}] * 4, "text": {"held_out": 4}},
        "evaluation": [{"windows": 1, "seqlen": 512}],
        "footprint": {"before": 20, "after": 10},
    }

    def planned(seconds: float, passes: int = 0, **more: bool) -> compress.Times:
        most, wall = dict(tests=100, rounding=32), 20 + spent.get("quantize", 0)
        return compress.plan_time(rehearsal, wall, seconds, **most, passes=passes, **more)

    windows, rounding, tokens, seconds = planned(1800)
    assert 1800 - 0.6 < seconds <= 1800
    assert windows == 100 and tokens % 512 == 0 and rounding == 32  # there is time for all tests
    # a pass takes 0.2 s; training on a window 0.6, the rest of the 5.2 was measuring
    assert (tokens - planned(1800, passes=30).tokens) / 512 == pytest.approx(30 * 0.2 / 0.6, abs=1)
    assert (tokens - planned(1500).tokens) / 512 == pytest.approx(300 / 0.6, abs=1)
    assert planned(300).tests == int(0.15 * 300 / (0.2 * (6 + 2)))
    least = planned(-5)
    assert (least.tests, least.tokens) == (compress.LEAST_TESTS, 512 * 16)
    assert least.seconds > 60
    spent["quantize"] = 2 * 8 * 0.2 + 30  # of which solving takes 30 seconds
    assert planned(1800).rounding == 32 and planned(200).rounding == (0.25 * 200 - 30) // 1.6
    assert planned(100)[2] == 0 and planned(-5)[1:3] == (8, 0)  # rounded, and not trained
    assert planned(-5, passes=30).tokens == 512 * 16  # what is pruned is trained
    chat = planned(170, trains=False)  # has all the time for rounding
    assert planned(170).rounding < chat.rounding and chat.tokens == 0 and chat.seconds <= 170


@pytest.mark.parametrize("recovery", [[], ["--recover", "8192"]], ids=["pruned", "trained"])
@pytest.mark.parametrize("target", [*compress.PLANS, *compress.SMALLER])
def test_main_takes_the_flags_of_every_plan(target: str, recovery: list[str]) -> None:
    parser = build_parser()
    smaller = f"{compress.SMALLER.get(target)} 0.5 {compress.PLANS[compress.ANY]}"
    plan = compress.PLANS.get(target, smaller)
    argv = ["--model", "m", "--trim_vocabulary", "--calibration_data", "uk", *plan.split()]
    argv += recovery
    check_flags(parser, parser.parse_args(argv))


def test_a_model_is_compressed_though_it_was_interrupted(
    trained: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 120, 8)
    Path("uk/test.jsonl").unlink()  # a tenth is held apart
    argv = "dense small --data uk --language uk-UA --minutes 1 --device cpu --for vllm".split()
    call, plan, runs = compress.call, compress.plan_time, []

    def plan_little(*given: float, **most: int) -> compress.Times:
        times = plan(*given, **most)
        assert times.tests > 0 and 8 <= times.rounding <= 32
        return compress.Times(min(2, times.tests), 8, 16 * 128, 600.0)

    def once_interrupted(module: str, *flags: object) -> int:
        runs.append([str(flag) for flag in flags])
        if len(runs) == 3:
            raise KeyboardInterrupt
        return 1 if module == "lib.commands.export" else call(module, *flags)

    monkeypatch.setattr("lib.commands.export.__main__.check_installed", lambda to: None)
    monkeypatch.setattr(compress, "call", once_interrupted)
    monkeypatch.setattr(compress, "plan_time", plan_little)
    assert run(compress.main, argv) == 130 and not Path("small").exists()
    said = capfd.readouterr()
    assert "the same command continues" in said.err
    plan_line = "about 10 min more: the least, 1. min in all; --minutes 1 is too short"
    assert re.search(plan_line, said.out)
    assert run(compress.main, [*argv, "--megabytes", "9"]) == 1
    assert "was begun with megabytes None, now it is 9" in capfd.readouterr().err
    assert run(compress.main, argv) == 1
    out, error = capfd.readouterr()
    assert error.endswith("small-vllm: not written, see above; the model is saved in small\n")
    # a rehearsal, dense, small, one for an engine, and two to measure
    assert runs[3] == runs[2] and len(runs) == 7
    assert compress.SAME_SOURCE in out
    before, after = (results(f"small-compress/{name}") for name in ("dense", "compressed"))
    assert before["method"] == "dense" and after["quantized"]["format"] == "q4_0"
    lines = Path("small-compress/tests/uk.jsonl").read_text("utf-8").splitlines()
    tests = tuple(json.loads(line)["text"] for line in lines)
    args = SimpleNamespace(**after["flags"])
    (source,), _, _ = named_sources(args, Plan.of(args))  # what is measured is not trained on
    train = read_documents(source, "train")[0]
    assert tests and train and not [text for text in train if text.startswith(tests)]
    assert "vocabulary" in after and after["recovery"]["tokens"] == 16 * 128
    assert [test["windows"] for test in before["evaluation"]] == [
        test["windows"] for test in after["evaluation"]
    ]
    assert metadata_load("small/README.md")["language"] == ["uk"]
    table = Path("small-compress/compressed.md").read_text("utf-8")
    assert table in out and "hf upload YOUR_NAME/small small" in out
    rows = {
        cells[1].strip(): cells[2:5] for cells in (row.split("|") for row in table.splitlines())
    }
    assert "rounded, not trained" in rows[""][1] and re.search(r"\d nats", str(rows))
    assert re.match(r" *\d", rows["bits per byte, uk"].pop(1))
    for name in ("on disk, MB", "tokens a second", "bits per byte, uk"):
        assert all(re.match(r"\d", cell.strip()) for cell in (rows[name][0], rows[name][-1])), name
    assert rows["on disk, MB"][0] != rows["on disk, MB"][2]


def test_a_chat_model_is_compressed_on_what_it_says(
    trained: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "dense")
    Path("dense/chat_template.jinja").write_text(chats.LLAMA_3)
    said = iter(tiny.sentences(200, 3, words=4))

    def answers(model: object, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return [encode(next(said)) if ends else tokens * [5] for _ in prompts]

    ends, encode = True, tiny.tiny_tokenizer(add_bos=False).encode
    monkeypatch.setattr(dialogues, "continue_rows", answers)
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    tiny.write_texts("uk", [*tiny.sentences(80), *tiny.sentences(160, 2, words=3)], 8)
    argv = "dense small --data uk --language uk --recover 1024 --device cpu".split()
    assert run(compress.main, [*argv, "--dialogues", "40"]) == 0
    out, err = capfd.readouterr()
    assert "A chat model: it answers prompts" in out and "40 dialogues" in out, err
    after = results("small-compress/compressed")
    shares = {each["name"]: each["share"] for each in after["calibration"]["sources"]}
    assert shares == pytest.approx({"uk": 1 / 3, "dialogues": 2 / 3}, abs=0.05)
    assert after["recovery"]["cross_entropy"] == 0
    assert [test["name"] for test in after["evaluation"]] == ["uk", "dialogues"]
    assert after["answers"][0]["prompts"] == 10
    assert "of 10 answers end, dialogues" in Path("small-compress/compressed.md").read_text()

    shutil.rmtree("small-compress")
    shutil.rmtree("small")
    ends = False
    assert run(compress.main, argv) == 0  # its answers do not end
    said = capfd.readouterr()
    assert "so it is no chat model" in said.err and "it is compressed on plain text" in said.out
    assert results("small-compress/compressed")["recovery"]["cross_entropy"] > 0


@pytest.mark.parametrize("kind", ["short texts", "dialogues", "small enough", "iq4_nl"])
def test_main_takes_what_is_planned(kind: str, capfd: pytest.CaptureFixture) -> None:
    chat = kind == "dialogues"  # beside short texts, which are joined alone
    tiny.write_model("dense", tokenizer=chats.tokenizer_with(chats.LLAMA_3) if chat else None)
    tiny.write_texts("uk", tiny.sentences(200, words=4), 8)
    if chat:
        chats.write(Path("said"), chats.some(80), chats.some(8, 1))
    more = {"short texts": ["--recover", "0"], "small enough": ["--megabytes", "9"]}
    more["iq4_nl"] = ["--recover", "0", "--quantize", "iq4_nl"]
    data = ["said", "uk"] if chat else ["uk"]
    argv = ["dense", "small", "--data", *data, "--device", "cpu", *more.get(kind, [])]
    assert run(compress.main, argv) == 0, capfd.readouterr().err
    assert "recovery" not in results("small-compress/compressed")
    if kind == "iq4_nl":
        assert "nothing pruned, about 0" in (said := capfd.readouterr().out) and "as iq4_nl" in said
        assert re.search(r"linears as llama.cpp's +\|.*\| *iq4_nl \|", said)
        assert "--type iq4_nl" in said and kind in metadata_load("small/README.md")["tags"]
    elif kind != "short texts":
        assert "recovery" not in results("small-compress/rehearsal")


def test_texts_that_are_measured_are_not_trained_on_once_they_are_cut() -> None:
    """`--data uk/a.jsonl --eval_data uk`: the tests become files of their own."""
    tiny.write_texts("uk", tiny.sentences(40, words=2000), 0)
    Path("uk/test.jsonl").unlink()
    parser, data = build_parser(), ["--model", "m", "--calibration_data", "uk/train.jsonl"]

    def named(args):
        return named_sources(args, Plan.of(args))

    _, _, tests = named(parser.parse_args([*data, "--eval_data", "uk"]))
    test = SimpleNamespace(name="uk", facts={"bytes": 40_000}, windows=range(100), dialogues=())
    texts = SimpleNamespace(tests=[test])
    job = SimpleNamespace(tests=tests, texts=texts, args=SimpleNamespace(column="text"))
    cut = compress.cut_tests(job, Path("cut"), 1)  # two documents and pieces of a third
    (train,), _, (test,) = named(parser.parse_args([*data, "--eval_data", *cut]))
    measured, trained = read_documents(test, "test")[0], read_documents(train, "train")[0]
    assert len(measured) > 3 and len(trained) > 37
    assert not [text for text in measured if any(text in each for each in trained)]


def test_killed_it_continues_to_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 120, 8)
    argv = "dense small --data uk --language uk --recover 8192 --device cpu".split()
    assert run(compress.main, argv) == 0
    Path("small").rename("whole")
    Path("small-compress").rename("whole-compress")
    for faults in (
        (
            "recovering 30",
            "before lib.run.save.write_tokenizer_model",
            "before lib.run.save.put_in_place",
        ),
        ("after lib.run.save.put_in_place",),
    ):
        for fault in faults:
            worker = Worker([argv], tmp_path, f"{fault}:SIGKILL", program="lib.commands.compress")
            assert worker.end().status == -signal.SIGKILL, fault
        assert run(compress.main, argv) == 0
        assert content("small") == content("whole") and not Path("small.partial").exists()
        whole, made = (results(f"{name}-compress/compressed") for name in ("whole", "small"))
        for key in ("method", "flags", "quantized", "vocabulary", "evaluation", "completions"):
            assert made[key] == whole[key], key
        assert made["recovery"]["curve"] == whole["recovery"]["curve"]
        shutil.rmtree("small")
        shutil.rmtree("small-compress")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    tiny.write_model("dense")
    tiny.write_texts("uk", 120, 4)
    argv = "dense small --data uk --recover 128 --device cpu".split()
    worker = Worker([argv], tmp_path, program="lib.commands.compress")
    wait_until(lambda: children(worker.process.pid))
    (run,) = children(worker.process.pid)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.end()
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert not list(Path("small-compress").rglob("results.json"))


@pytest.mark.parametrize(
    ("name", "kind", "shares"),
    [("Llama", "neurons", (0.97, 0.93, 0.89)), ("Qwen3-MoE", "experts", (0.99, 0.97, 0.94))],
)
def test_parts_are_removed_until_the_file_is_as_small(
    name: str, kind: str, shares: tuple[float, ...]
) -> None:
    tiny.write_model("dense", tiny.ARCHITECTURES[name]())
    tiny.write_texts("uk", 40, 4)
    flags = ["--model", "dense", "--device", "cpu", "--seqlen", "32", "--calibration_data", "uk"]
    flags += ["--nsamples", "8", "--trim_vocabulary", *compress.SMALLER[kind].split(), "0.5"]
    job = compress.check_job([*flags, "--quantize", "q4_0"], recover=128)
    type_, removed, what = compress.choose_size(job, None)
    assert (type_, removed) == ("q4_0", None) and "nothing pruned" in what
    whole = float(what.split("about ")[1].split()[0])
    sizes = [whole * share for share in shares]
    ratios = [float(compress.choose_size(job, size)[1]) for size in sizes]
    assert 0 < ratios[0] <= ratios[1] <= ratios[2] < 1 and ratios[0] < ratios[2]
    with pytest.raises(compress.UserError, match=f"{kind} in each block.*is the least"):
        compress.choose_size(job, 0.001)
    type_, removed, what = compress.choose_size(job, 2 * whole)
    assert (type_, removed) == ("q8_0", None) and "nothing rounded to 4 bits" in what


def test_windows_are_as_long_as_the_texts_allow() -> None:
    tiny.write_model("dense", tiny.tiny_llama(max_position_embeddings=1024))
    tiny.write_texts("uk", tiny.sentences(7, words=40), 8)
    flags = ["--model", "dense", "--device", "cpu", "--calibration_data", "uk", "--nsamples", "8"]
    job = compress.check_job([*flags, "--quantize", "q4_0"], recover=2048)
    assert 128 <= job.seqlen < 512 and job.texts.training.windows.ids.shape[1] == job.seqlen


def test_commands_are_named_as_this_one_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CALLED, raising=False)
    assert [typed("gguf"), typed("prune")] == ["bash launch.sh gguf", "python main.py"]
    monkeypatch.setenv(CALLED, "langprune")
    assert [typed("gguf"), typed("prune")] == ["langprune gguf", "langprune prune"]


def test_a_failed_measurement_leaves_the_others(monkeypatch) -> None:
    monkeypatch.setattr(compress, "call", lambda *_: 1)
    nothing = {"evaluation": [], "sparsity_type": None}
    monkeypatch.setattr(compress, "read_results", lambda _: nothing)
    table = compress.comparison(["dense", "small"], Path("."), "")
    assert "| on disk, MB | – | –" in " ".join(table.split())


def test_commands_start_from_any_folder(capfd: pytest.CaptureFixture) -> None:
    Path("lib").mkdir()  # a folder of the user's, which hides no module
    Path("lib/__init__.py").touch()
    assert call("lib.commands.unpack", "--help") == 0
    assert call("lib.commands.unpack", "nowhere", "new") == 1
    assert "nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "inf"], "--minutes: invalid int value: 'inf'"),
        (["--minutes", "0"], "--minutes: 0: must be at least 1"),
        (["--recover", "3"], "--recover 3: less than one step"),
        (["--save", "mine/thesis.txt"], "--save mine/thesis.txt: is a file"),
        (["--save", "mine"], "--save mine: holds thesis.txt; name a new folder"),
        (["--megabytes", "1", "--for", "packed"], "--megabytes 1: leave out --for packed"),
        (["--for", "packed", "any"], "--for packed: no other engine runs that; name it alone"),
        (["--quantize", "iq4_nl", "--for", "vllm"], "llama.cpp and ollama alone run it; leave out"),
        (
            ["--quantize", "iq4_nl", "--for", "packed"],
            "--quantize iq4_nl: llama.cpp and ollama alon",
        ),
        (["--", "--quantize", "iq4_nl"], "--quantize: compress sets it; use its own flags"),
        (["--for", "2:4"], "invalid choice: '2:4'"),
        (["--language", "xx"], "--language xx: is no language"),
        (["--", "--quantize", "q5"], "--quantize"),
        (["--save_model", "mine"], "--save_model: compress sets it"),
        (["--minuts", "3"], "unrecognized arguments: --minuts 3; --help lists all flags"),
    ],
)
def test_mistakes_end_it_before_the_model_is_measured(
    flags: list[str], message: str, capfd: pytest.CaptureFixture
) -> None:
    assert message in _refused(["dense", "small", "--data", "uk", *flags], capfd)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("dense taken --data uk", "OUT taken: taken.gguf exists; name a new file"),
        ("dense mine --data uk", "OUT mine: holds thesis.txt; name a new folder"),
        ("--seqlen 64 dense small --data uk", "--seqlen: give flags of main.py after"),
        ("dense small", "--language: name one, such as uk, or give texts of your own by --data"),
        ("dense small --language uk", "--language uk: the hub can't be reached"),
        (
            "dense small --data uk --for packed --nsamples 9999",
            "tokens are",
        ),
        ("nowhere/model small --data uk", "nowhere/model"),
    ],
)
def test_what_can_not_be_is_one_line(argv: str, message: str, capfd: pytest.CaptureFixture) -> None:
    assert message in _refused(argv.split(), capfd)


def _refused(argv: list[str], capfd: pytest.CaptureFixture) -> str:
    """What the command says that writes nothing."""
    tiny.write_model("dense")
    tiny.write_texts("uk", 40, 4)
    Path("mine").mkdir(exist_ok=True)
    for file in ("mine/thesis.txt", "taken.gguf"):
        Path(file).write_text("mine")
    before = content(".")
    position = argv.index("--") if "--" in argv else len(argv)
    try:
        status = run(compress.main, [*argv[:position], "--device", "cpu", *argv[position:]])
    except SystemExit as left:
        status = left.code
    assert status in (1, 2) and content(".") == before
    return capfd.readouterr().err


def test_what_another_command_or_the_disk_stands_against(monkeypatch, capfd) -> None:
    argv = "dense small --data uk --recover 128".split()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    said = _refused([*argv, "--nsamples", "8"], capfd)
    assert "--save small-compress: training keeps up to" in said and "98 KiB free" in said
    with exclusive_lock(Path("small-compress.lock"), ""):
        said = _refused(argv, capfd)
    assert "--save small-compress: another command works there" in said


def test_nothing_is_packed_where_packed_weights_are_slow(monkeypatch, capfd) -> None:
    monkeypatch.setattr("lib.packed.kernels.supported", lambda: False)
    assert "--for packed: its kernels need an x86-64" in _refused(
        ["dense", "small", "--data", "uk", "--for", "packed"], capfd
    )
