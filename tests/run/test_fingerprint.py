"""What decides a result: every flag has a role, and the fingerprint follows it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from support import LIMIT, QUICK, start

from lib.run.check import check
from lib.run.code_digest import ROOT, code_digest, files_digest, run_files
from lib.run.fingerprint import CODE, differences
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
    "rounding": ["nearest"],
    "pack_embeddings": ["8"],
    "neurons_multiple": ["32"],
    "recover": ["99"],
    "recover_rank": ["4"],
    "recover_rate": ["0.1"],
    "recover_ce": ["0.2"],
    "eval_only": [],
    "abilities": [],
    "fidelity": [],
    "depth": [],
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
    "resume_anyway": ["--resume", "kept"],
    "debug": [],
}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    return ["--model", str(model), *BASE, "--calibration_data", str(texts)]


def difference(before: dict, now: dict) -> str:
    """The name of the first thing in which two fingerprints differ."""
    return next(iter(differences(before, now)))


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
    base: list[str], harness: None
) -> None:
    before = made_of(base)
    assert made_of(base) == before
    for name, value in OTHER.items():
        now = made_of([*base, f"--{name}", *value])
        assert difference(before, now) == f"--{name}", name
    for name, value in SAME.items():
        assert made_of([*base, f"--{name}", *value]) == before, name


def test_a_method_that_reads_no_text_depends_on_none(base: list[str]) -> None:
    base[base.index("wanda")] = "magnitude"
    assert made_of([*base, "--seed", "1", "--nsamples", "3"]) == made_of(base)


def test_inputs_count_by_what_they_hold(base: list[str], tmp_path: Path) -> None:
    before = made_of(base)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        os.utime(file)
    shutil.copytree(tmp_path / "uk", tmp_path / "there" / "uk")
    moved = [*base, "--model", str(tmp_path / "moved")]
    assert made_of([*moved, "--calibration_data", str(tmp_path / "there" / "uk")]) == before
    tiny.write_model(tmp_path / "moved", tiny.tiny_llama(rms_norm_eps=1e-5))
    assert difference(before, made_of(moved)) == "config of --model"
    rows = (tmp_path / "uk" / "test.jsonl").read_text("utf-8")
    (tmp_path / "uk" / "test.jsonl").write_text(rows.replace("ліс", "гай", 1), "utf-8")
    assert difference(before, made_of(base)) == "windows of --eval_data uk"


def test_a_teacher_counts_by_what_it_holds(base: list[str], tmp_path: Path) -> None:
    base = [*base[:2], *base[4:], "--recover", "99", "--teacher"]  # no method
    tiny.write_model(tmp_path / "one", tiny.tiny_llama())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = made_of([*base, str(tmp_path / "one")])
    assert made_of([*base, str(tmp_path / "two")]) == before
    tiny.write_model(tmp_path / "two", tiny.tiny_llama(seed=5))
    now = made_of([*base, str(tmp_path / "two")])
    assert [*differences(before, now)] == ["weights of --teacher"]
    assert "--seed" in before and "windows of --recover" in before


def test_pairs_count_by_what_they_hold(base: list[str], tmp_path: Path) -> None:
    file, moved = tmp_path / "pairs.jsonl", tmp_path / "moved.jsonl"
    file.write_text('{"good": "one", "bad": "two"}', "utf-8")
    shutil.copy(file, moved)
    before = made_of([*base, "--pairs", str(file)])
    assert made_of([*base, "--pairs", str(moved)]) == before
    moved.write_text('{"good": "one", "bad": "six"}', "utf-8")
    assert difference(before, made_of([*base, "--pairs", str(moved)])) == "--pairs"


def test_a_vocabulary_counts_by_its_tokens(base: list[str], tmp_path: Path) -> None:
    base = [*base, "--trim_vocabulary"]
    before = made_of(base)
    assert made_of([*base, "--vocabulary_data", str(tmp_path / "uk")]) == before
    texts = tiny.write_texts(tmp_path / "more", train=["☀ " * 9])
    more = made_of([*base, "--vocabulary_data", str(texts), "--vocabulary_size", "310"])
    assert difference(before, more) == "--vocabulary_size"
    few = made_of([*base, "--vocabulary_size", "290"])
    name = "tokens of --trim_vocabulary"
    assert len({one[name] for one in (before, more, few)}) == 3
    assert name not in made_of(base[:-1])


def test_other_weights_of_the_same_size_and_time_count(base: list[str], tmp_path: Path) -> None:
    before, file = made_of(base), tmp_path / "model" / "model.safetensors"
    times, size = file.stat(), file.stat().st_size
    tiny.write_model(tmp_path / "model", tiny.tiny_llama(seed=5))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == size
    assert [*differences(before, made_of(base))] == ["weights of --model"]


def test_one_changed_tensor_counts(base: list[str], tmp_path: Path) -> None:
    before, file = made_of(base), tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert [*differences(before, made_of(base))] == ["weights of --model"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", '{"eos_token_id": 7, "transformers_version": "5.0.0"}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("special_tokens_map.json", "{}"),
    ],
)
def test_settings_beside_the_weights_count_for_what_is_saved(
    name: str, text: str, base: list[str], tmp_path: Path
) -> None:
    before, file = made_of(base), tmp_path / "model" / name
    file.write_text(text)
    now = made_of(base)
    assert [*differences(before, now)] == ["tokenizer and generation settings of --model"]
    file.write_text(text.replace("5.0.0", "5.24.0"))
    assert made_of(base) == now
    (tmp_path / "model" / "notes.txt").write_text("of no consequence")
    assert made_of(base) == now


def test_code_that_comes_with_a_model_counts_where_it_is_run(
    base: list[str], tmp_path: Path
) -> None:
    code = tmp_path / "model" / "modeling_own.py"
    code.write_text("scale = 1\n")
    plain, trusted = made_of(base), made_of([*base, "--trust_remote_code"])
    code.write_text("scale = 1  # as published\n")
    assert made_of([*base, "--trust_remote_code"]) == trusted
    code.write_text("scale = 2\n")
    assert made_of(base) == plain
    now = made_of([*base, "--trust_remote_code"])
    assert [*differences(trusted, now)] == ["code of --model"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program."""
    root = tmp_path_factory.mktemp("program")
    shutil.copytree(ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", root)
    return root


def digest_of(root: Path) -> str:
    code_digest.cache_clear()
    return code_digest(root)


@pytest.fixture(scope="module")
def before(program: Path) -> str:
    return digest_of(program)


COUNTS = "main.py lib/run/check.py lib/methods/admm.py lib/packed/kernels.cpp lib/util/files.py"


def with_more_code(text: str, suffix: str) -> str:
    return text + ("\nint more;\n" if suffix == ".cpp" else "\nmore = 1\n")


def with_remarks(text: str, suffix: str) -> str:
    if suffix == ".cpp":
        return "// a remark\n/* and another\n*/\n\n" + text
    return text.replace('"""', '"""Said otherwise. ', 1) + "\n\n# a remark\n"


@pytest.mark.parametrize("change", [with_more_code, with_remarks])
def test_code_that_a_run_uses_counts_and_what_it_says_of_itself_does_not(
    change: Callable[[str, str], str], program: Path, before: str
) -> None:
    files = [program / name for name in COUNTS.split()]
    assert set(files) <= set(run_files(program))
    texts = {file: file.read_text("utf-8") for file in files}
    for file, text in texts.items():
        one = files_digest([file])
        file.write_text(change(text, file.suffix), "utf-8")
        assert file.read_text("utf-8") != text
        assert (files_digest([file]) != one) == (change is with_more_code), file
    assert (digest_of(program) != before) == (change is with_more_code)
    for file, text in texts.items():
        file.write_text(text, "utf-8")


def test_code_that_no_run_uses_does_not_count(program: Path, before: str) -> None:
    for name in ("report/report.py", "data/ubertext.py", "sweep/runs.py", "demo/demo.py"):
        (program / "lib" / name).write_text("more = 1\n", "utf-8")
    assert digest_of(program) == before


def test_what_a_run_imports_is_among_its_files(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_texts(tmp_path / "uk")
    code = (
        "import sys, main; main.main(sys.argv[1:]); "
        "own = [m for n, m in sys.modules.items() if n.split('.')[0] == 'lib']; "
        "print(*(module.__file__ for module in own), sep='\\n')"
    )
    argv = ["--model", "model", *BASE, "--calibration_data", "uk", "--save_model", "new"]
    process = start(["-c", code, *argv, "--recover", "64", "--replace_sparse_layers"], tmp_path)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    used = {Path(line) for line in out.splitlines() if line.endswith(".py")}
    assert len(used) > 50 and used <= set(run_files(ROOT))


def test_the_code_is_part_of_the_fingerprint(base: list[str]) -> None:
    assert made_of(base)[CODE] == code_digest()


def test_settings_are_what_no_other_field_tells() -> None:
    parse = build_parser().parse_args
    pruned = settings(parse(["--model", "m", *BASE, "--nsamples", "5"]))
    assert pruned["nsamples"] == 5 and pruned["seqlen"] == 32
    assert not pruned.keys() & {"seed", "model", "save", "device", "batch_size", "prune_method"}
    dense = settings(parse(["--model", "m", "--eval_only"]))
    assert "nsamples" not in dense and dense["dtype"] == "auto"
