"""What decides a result: every flag has a role, and the fingerprint follows it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
from support import QUICK

from lib.run import fingerprint
from lib.run.check import check
from lib.run.fingerprint import TIMES, difference
from lib.run.flag import INPUT, PLACE, RESULT, SHOWN, SPEED
from lib.run.flags import FLAGS, build_parser, settings

pytestmark = pytest.mark.usefixtures("elsewhere")
BASE = ["--prune_method", "wanda", *QUICK]
# another value for every flag that changes the result, beside flags that it needs
OTHER = {
    "dtype": ["bfloat16"],
    "load_bit": ["8"],
    "seqlen": ["16"],
    "bos": ["always"],
    "trust_remote_code": [],
    "seed": ["1"],
    "nsamples": ["7"],
    "trim_vocabulary": [],
    "vocabulary_size": ["300"],
    "vocabulary_minimum": ["2"],
    "keep_reserved_tokens": [],
    "prune_method": ["sparsegpt"],
    "sparsity_ratio": ["0.6"],
    "sparsity_type": ["2:4"],
    "allocation": ["owl"],
    "use_variant": [],
    "blend": ["0.5"],
    "replace_sparse_layers": [],
    "pack_bits": ["8"],
    "recover": ["99"],
    "recover_rank": ["4"],
    "recover_rate": ["0.1"],
    "recover_ce": ["0.2"],
    "eval_only": [],
    "abilities": [],
    "fidelity": [],
    "tasks": ["arc"],
}
SAME = {
    "cache_dir": ["other"],
    "prompts": ["0"],
    "card_without_prompts": [],
    "batch_size": ["3"],
    "timeout": ["5"],
    "offload": ["away"],
    "save": ["there"],
    "save_model": ["model-out"],
    "resume": ["kept"],
    "debug": [],
}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    return ["--model", str(model), *BASE, "--calibration_data", str(texts)]


def made_of(argv: list[str]) -> dict:
    found = check(build_parser().parse_args(argv)).fingerprint
    return found["pruning"] | found["measuring"]


def test_every_flag_has_a_role_and_these_tests_know_it() -> None:
    roles = {name: flag.role for name, flag in FLAGS.items()}
    assert set(roles.values()) == {RESULT, INPUT, SHOWN, SPEED, PLACE}
    assert {name for name, role in roles.items() if role == RESULT} == OTHER.keys()
    others = {name for name, role in roles.items() if role in (SHOWN, SPEED, PLACE)}
    assert others - {"device"} == SAME.keys()


def test_flags_that_change_the_result_and_only_these_change_the_fingerprint(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.quality.tasks.check_tasks", lambda *_: None)
    before = made_of(base)
    assert made_of(base) == before
    for name, value in OTHER.items():
        now = made_of([*base, f"--{name}", *value])
        assert difference(before, now)[0] == f"--{name}", name
    for name, value in SAME.items():
        assert made_of([*base, f"--{name}", *value]) == before, name


def test_a_method_that_reads_no_text_depends_on_none(base: list[str]) -> None:
    base[base.index("wanda")] = "magnitude"
    assert made_of([*base, "--seed", "1", "--nsamples", "3"]) == made_of(base)


def test_inputs_count_by_what_they_hold(base: list[str], tmp_path: Path) -> None:
    before = made_of(base)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")  # with the times of its files
    shutil.copytree(tmp_path / "uk", tmp_path / "there" / "uk")
    moved = [*base, "--model", str(tmp_path / "moved")]
    assert made_of([*moved, "--calibration_data", str(tmp_path / "there" / "uk")]) == before
    os.utime(tmp_path / "moved" / "model.safetensors")
    assert difference(before, made_of(moved))[0] == TIMES
    tiny.write_model(tmp_path / "moved", tiny.tiny_llama(rms_norm_eps=1e-5))
    assert difference(before, made_of(moved))[0] == "config of --model"
    rows = (tmp_path / "uk" / "test.jsonl").read_text("utf-8")
    (tmp_path / "uk" / "test.jsonl").write_text(rows.replace("ліс", "гай", 1), "utf-8")
    assert difference(before, made_of(base))[0] == "windows of --eval_data uk"


def test_a_teacher_counts_by_what_it_holds(base: list[str], tmp_path: Path) -> None:
    base = [*base[:2], *base[4:], "--recover", "99", "--teacher"]  # no method
    tiny.write_model(tmp_path / "one", tiny.tiny_llama())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = made_of([*base, str(tmp_path / "one")])
    assert made_of([*base, str(tmp_path / "two")]) == before
    os.utime(tmp_path / "two" / "model.safetensors")
    assert difference(before, made_of([*base, str(tmp_path / "two")]))[0].endswith("--teacher")
    assert "--seed" in before and "windows of --recover" in before


def test_pairs_count_by_what_they_hold(base: list[str], tmp_path: Path) -> None:
    file, moved = tmp_path / "pairs.jsonl", tmp_path / "moved.jsonl"
    file.write_text('{"good": "one", "bad": "two"}', "utf-8")
    shutil.copy(file, moved)
    before = made_of([*base, "--pairs", str(file)])
    assert made_of([*base, "--pairs", str(moved)]) == before
    moved.write_text('{"good": "one", "bad": "six"}', "utf-8")
    assert difference(before, made_of([*base, "--pairs", str(moved)]))[0] == "--pairs"


def test_a_vocabulary_counts_by_its_tokens(base: list[str], tmp_path: Path) -> None:
    base = [*base, "--trim_vocabulary"]
    before = made_of(base)
    assert made_of([*base, "--vocabulary_data", str(tmp_path / "uk")]) == before
    texts = tiny.write_texts(tmp_path / "more", train=["☀ " * 9])
    more = made_of([*base, "--vocabulary_data", str(texts), "--vocabulary_size", "310"])
    assert difference(before, more)[0] == "--vocabulary_size"
    few = made_of([*base, "--vocabulary_size", "290"])
    name = "tokens of --trim_vocabulary"
    assert len({one[name] for one in (before, more, few)}) == 3
    assert name not in made_of(base[:-1])


def test_the_code_counts_where_it_takes_part(tmp_path: Path, monkeypatch) -> None:
    library = tmp_path / "lib"
    shutil.copytree(fingerprint.LIBRARY, library)
    monkeypatch.setattr(fingerprint, "LIBRARY", library)
    digest = fingerprint.code_digest.__wrapped__
    before = digest()
    (library / "report" / "report.py").write_text("")
    assert digest() == before
    (library / "methods" / "wanda.py").write_text("")
    assert digest() != before


def test_settings_are_what_no_other_field_tells() -> None:
    parse = build_parser().parse_args
    pruned = settings(parse(["--model", "m", *BASE, "--nsamples", "5"]))
    assert pruned["nsamples"] == 5 and pruned["seqlen"] == 32
    assert not pruned.keys() & {"seed", "model", "save", "device", "batch_size", "prune_method"}
    dense = settings(parse(["--model", "m", "--eval_only"]))
    assert "nsamples" not in dense and dense["dtype"] == "auto"
