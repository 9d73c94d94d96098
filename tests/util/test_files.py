"""What a run writes: whole or not at all, and a card that the hub can read."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from support import ROOT

from lib.report.results import write_results
from lib.run.card import languages_of, model_card
from lib.run.record import print_summary, write_log
from lib.util import files as save
from lib.util.errors import UserError
from lib.util.files import check_output_folder, staged_folder, write_text
from lib.util.host import gib


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# --- a folder, old or new


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["model", "model[1]*?"])
def test_a_folder_is_replaced_as_a_whole(
    name: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # a system that can't swap two folders in one step
        monkeypatch.setattr(save, "_exchanged", lambda a, b: False)
    target = tmp_path / "deep" / name
    with staged_folder(target) as stage:
        fill(stage, a="1", b="1")
        assert not target.exists()
    with staged_folder(target) as stage:
        fill(stage, a="2")
        assert content(target) == {"a": "1", "b": "1"}
    assert content(target) == {"a": "2"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "full"), SafetensorError("x")]
)
def test_an_error_leaves_the_old_folder(error: BaseException, tmp_path: Path) -> None:
    target = fill(tmp_path / "model", a="old")
    raised = UserError if isinstance(error, OSError | SafetensorError) else type(error)
    with pytest.raises(raised) as caught, staged_folder(target, "--save_model") as stage:
        fill(stage, a="new")
        raise error
    assert content(target) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [target]
    if raised is UserError:
        assert str(caught.value).startswith(f"--save_model {target}: can't be saved")


def test_stages_of_killed_runs_go_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    left = fill(tmp_path / f".model{save.STAGE_MARK}x1", a="half")
    other = fill(tmp_path / f".model2{save.STAGE_MARK}x1", a="not ours")
    with staged_folder(target) as stage:
        fill(stage, a="new")
    assert not left.exists() and other.exists() and content(target) == {"a": "new"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = fill(tmp_path / "disk" / "real", a="old")
    link = tmp_path / "model"
    link.symlink_to(real)
    with staged_folder(link) as stage:
        fill(stage, a="new")
    assert link.is_symlink() and content(real) == {"a": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "model"}


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as stage:
        fill(stage / "sub", a="1")
        (stage / "sub" / "a").chmod(0o600)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*")]
    assert sorted(modes) == [0o644, 0o755]


SAVER = """
import sys
from pathlib import Path
from lib.util.files import staged_folder
for version in range(10**6):
    with staged_folder(sys.argv[1]) as stage:
        for name in "abcdef":
            (stage / name).write_text(str(version) * 2000)
    if version == 1:
        print("begun", flush=True)
"""


def test_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target, draw = tmp_path / "model", random.Random(0)
    for _ in range(10):
        code = [sys.executable, "-c", SAVER, str(target)]
        process = subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = content(target)
        assert set(found) == set("abcdef") and len(set(found.values())) == 1


# --- small files


def test_a_text_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")
    assert file.stat().st_mode & 0o777 == 0o644

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        write_text(file, "new")
    assert content(tmp_path) == {"results.json": "old"}


def test_the_log_in_wandas_form(tmp_path: Path) -> None:
    file = write_log(tmp_path, "wanda", 0.49996, {"uk": 12.34567})
    assert file.name == "log_wanda.txt"
    text = "method\tactual_sparsity\tppl_test\nwanda\t0.5000\t12.3457\n"
    assert file.read_text() == text
    write_log(tmp_path, "wanda", 0.5, {"uk": 1.0, "en": 2.0})
    assert file.read_text().splitlines() == [
        "method\tactual_sparsity\tppl_test\tppl_uk\tppl_en",
        "wanda\t0.5000\t1.0000\t1.0000\t2.0000",
    ]


def test_results_are_json_whatever_was_measured(tmp_path: Path) -> None:
    found = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "текст": Path("x")}
    text = write_results(tmp_path, found).read_text("utf-8")
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "текст": "x"}
    assert "NaN" not in text and "текст" in text


def results(**changes: object) -> dict:
    calibration = {"name": "uk", "windows": 8, "seqlen": 32, "digest": "abc123"}
    test = {"name": "uk", "perplexity": 12.34567, "tokens": 640, "windows": 20}
    test |= {"standard_error": math.nan, "bits_per_byte": 1.5}
    return {
        "model": "owner/name",
        "method": "wanda",
        "sparsity_type": "unstructured",
        "sparsity_ratio": 0.625,
        "seed": 3,
        "sparsity": {"overall": 0.62499},
        "calibration": calibration,
        "evaluation": [test],
        "perplexity": {"uk": 12.34567},
        "seconds": {"load": 1.0, "eval": 2.0},
        "peak_memory": {"host": 2**30, "device": None},
    } | changes


def test_the_summary_ends_with_the_perplexity(capsys: pytest.CaptureFixture) -> None:
    print_summary(results())
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "perplexity uk: 12.3457"
    assert "nan" not in out and "host 1.00 GiB" in out


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert gib(size) == text


# --- what can be checked before


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_folder("--save", str(tmp_path / "new" / "deep"))
    check_output_folder("--save", str(fill(tmp_path / "logs", log="kept")))
    fill(tmp_path / "model" / "additional_chat_templates", **{"a.jinja": ""})
    model = str(fill(tmp_path / "model", **{"config.json": "{}", "model.safetensors": ""}))
    check_output_folder("--save_model", model, may_hold="config.json")
    fill(tmp_path / "model", **{".git": "history"})
    with pytest.raises(UserError, match=r"holds \.git, which is no part of a model"):
        check_output_folder("--save_model", model, may_hold="config.json")
    with pytest.raises(UserError, match=r"--resume .*: holds log, but no job\.json"):
        check_output_folder("--resume", str(tmp_path / "logs"), may_hold="job.json")
    empty = str(fill(tmp_path / "empty"))
    check_output_folder("--save_model", empty, may_hold="config.json")
    assert content(tmp_path / "logs") == {"log": "kept"}
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == empty)
    with pytest.raises(UserError, match=f"--save_model {empty}: a mount point"):
        check_output_folder("--save_model", empty, may_hold="config.json")


# --- the model card


def parsed(card: str) -> tuple[dict, str]:
    """The card's YAML head and its text."""
    empty, head, text = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), text


def test_a_card() -> None:
    head, text = parsed(model_card(results(), ["uk", "no"], ["More."]))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "language": ["uk", "no"],  # not the number or truth value that YAML makes of it
        "tags": ["pruned", "sparse", "wanda"],
    }
    assert text.startswith("# owner/name, pruned by wanda to 62.5% zeros\n")
    for part in ("| calibrated on | uk, 8 windows of 32 tokens |", "`abc123`", "| seed | 3 |"):
        assert part in text
    assert "| uk | 12.3457 | 640 |" in text and "0.6250" in text and text.endswith("More.\n")


def test_a_card_of_a_local_model_without_calibration(tmp_path: Path) -> None:
    made = results(model=str(tmp_path), calibration=None, sparsity_type="2:4", method="magnitude")
    head, text = parsed(model_card(made, [], []))
    assert "base_model" not in head and "language" not in head
    assert text.startswith(f"# {tmp_path.name}, pruned by magnitude to 2:4\n")
    assert "calibrated" not in text and str(tmp_path.parent) not in text


@pytest.mark.parametrize(
    ("names", "languages"),
    [
        (["ubertext"], ["uk"]),
        (["c4"], ["en"]),
        (["c4:de", "wikipedia:uk", "c4:de"], ["de", "uk"]),
        (["fineweb2:ukr_Cyrl", "c4:zh-Latn"], ["ukr", "zh"]),
        (["uk", "texts/en"], ["uk", "en"]),
        (["out", "data", "set:raw", "lang-pruning-uk-uber-text-2"], []),
    ],
)
def test_languages(names: list[str], languages: list[str]) -> None:
    assert languages_of(names) == languages
