"""Every name of launch.sh reaches its command, and the recipes for main.py run to their ends."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from hub import Hub
from support import QUICK, ROOT, launch, launched, results, weights
from transformers import AutoModelForCausalLM

from lib.run.flags import build_parser, check_flags

pytestmark = pytest.mark.usefixtures("at_place")
RECIPES = {  # of main.py: their flags
    "unstructured": "--prune_method sparsegpt",
    "semistructured": "--prune_method sparsegpt --sparsity_type 2:4 --replace_sparse_layers",
    "c4": "--prune_method sparsegpt --prune_on_c4",
    "dense": "--eval_only",
}


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(trained, folder / "model")
    tiny.write_texts(folder / "uk", train=30, test=4)
    english = tiny.sentences(30, seed=9)
    tiny.write_texts(folder / "en", train=english, test=english[:4])
    shown = folder / "python"  # prints its arguments
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    shown.chmod(0o755)
    return folder


def started(place: Path, *argv: str) -> list[str]:
    """Return the arguments that launch.sh gives to Python."""
    return launched(list(argv), place, PYTHON=str(place / "python")).splitlines()


def test_every_name_reaches_a_command_that_is_there(place: Path) -> None:
    names = set(re.findall(r"^  (\w+)", launched([], place), re.MULTILINE))
    cases = (ROOT / "launch.sh").read_text("utf-8").partition("case $name in")[2]
    cases = re.findall(r"^    ([\w| ]+)\)", cases, re.MULTILINE)
    assert {name for line in cases for name in line.split(" | ")} - {"help"} == names
    for name in names - RECIPES.keys():
        argv = started(place, name, "a model", "b")
        if argv[0] == "-P":
            assert argv[1] == "-m" and find_spec(argv[2]), name
            assert argv[3:] == ["a model", "b"]
        else:
            assert Path(argv[0]).is_file(), name


@pytest.mark.parametrize(("name", "flags"), RECIPES.items())
def test_recipes_hand_on_their_flags(name: str, flags: str, place: Path) -> None:
    main, *argv = started(place, name, "a model", "--nsamples", "3")
    assert main == str(ROOT / "main.py")
    assert argv[:2] == ["--model", "a model"] and argv[-2:] == ["--nsamples", "3"]
    assert flags in " ".join(argv)
    args = build_parser().parse_args(argv)
    check_flags(build_parser(), args)
    assert args.save == f"out/{name}"


@pytest.mark.parametrize(
    "argv", [["nosuch"], ["dense"], ["unstructured", "--device", "cpu"], ["vocabulary", "model"]]
)
def test_a_mistake_is_refused_in_one_line(argv: list[str], place: Path) -> None:
    done = launch(argv, place)
    assert done.status == 2 and not done.out
    assert done.err.count("\n") == 1 and argv[0] in done.err


# --- recipes on a hub, in a cache, packed and unpacked


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Hub]:
    """A hub with the published data sets, and the model as owner/name."""
    rows = {split: (place / f"uk/{split}.jsonl").read_bytes() for split in ("train", "test")}
    english = gzip.compress((place / "en/train.jsonl").read_bytes())
    repositories = {
        "datasets/mshamrai/lang-pruning-uk-uber-text-2": {
            f"{split}.jsonl": text for split, text in rows.items()
        },
        "datasets/allenai/c4": {"en/c4-train.00000-of-01024.json.gz": english},
        "models/owner/name": {
            file.name: file.read_bytes() for file in (place / "model").iterdir() if file.stem
        },
    }
    with Hub(repositories) as found:
        yield found


def test_a_model_and_texts_of_the_hub(hub: Hub, place: Path) -> None:
    argv = ["unstructured", "owner/name", "--cache_dir", "weights", "--save_model", "pruned"]
    said = launched(argv, place, *QUICK, **hub.environment(place))
    pruned = results("out/unstructured")
    assert pruned["sparsity"]["overall"] == 0.5 and pruned["calibration"]["name"] == "ubertext"
    assert "perplexity ubertext: " in said
    assert list(Path("weights/models--owner--name/snapshots").glob("*/model.safetensors"))
    assert "base_model: owner/name\n" in Path("pruned/README.md").read_text("utf-8")

    hub.status = 500  # the model is in the cache
    try:
        argv = ["dense", "owner/name", "--cache_dir", "weights", "--eval_data", "uk"]
        launched(argv, place, *QUICK, **hub.environment(place))
    finally:
        hub.status = None
    dense = results("out/dense")
    assert dense["method"] == "dense" and dense["sparsity"]["overall"] < 0.01
    assert dense["perplexity"]["uk"] < pruned["perplexity"]["ubertext"]  # of the same text


def test_c4_calibrates_on_english_and_measures_on_ubertext(hub: Hub, place: Path) -> None:
    launched(["c4", "model"], place, *QUICK, **hub.environment(place))
    found = results("out/c4")
    assert found["calibration"]["name"] == "c4" and list(found["perplexity"]) == ["ubertext"]
    assert any(path.endswith("en/c4-train.00000-of-01024.json.gz") for path in hub.asked)


def test_2_of_4_packed_and_unpacked(place: Path) -> None:
    argv = ["semistructured", "model", "--calibration_data", "uk", "--save_model", "packed"]
    launched(argv, place, *QUICK)
    found = results("out/semistructured")
    assert found["sparsity"]["overall"] == 0.5 and found["packed"]["bits"] == 16
    assert any(name.endswith("q_proj.mask") for name in weights("packed"))
    assert launched(["unpack", "packed", "plain"], place) == "unpacked: plain\n"
    plain = AutoModelForCausalLM.from_pretrained("plain")
    groups = plain.model.layers[0].mlp.down_proj.weight.view(-1, 4)
    assert ((groups == 0).sum(1) == 2).all()
    kept = torch.cat([one[one != 0] for one in weights("plain").values()])
    assert kept.isfinite().all() and len(kept) > 10_000
    assert launch(["unpack", "packed", "plain"], place).status == 1  # it is not empty


# --- several runs, and what compares them


def test_languages_overlap_and_report(place: Path) -> None:
    said = launched(["languages", "model", "uk", "en"], place, "--", *QUICK)
    assert "about" in said and said.count("\n| wanda ") == 2 and said.count("\n| dense ") == 1
    text = Path("languages/overlap/overlap.md").read_text("utf-8")
    shares = pair_row(text)
    assert "uk (seed 0)" in text and "en (seed 0)" in text and "excess" in text
    assert 50 < shares[1] < 100 and shares[2] < 60  # both keep; chance

    runs = [f"languages/model/wanda-50-{name}-seed0" for name in ("uk", "en")]
    assert pair_row(launched(["overlap", *runs, "--out", "shared"], place)) == shares


def pair_row(text: str) -> list[float]:
    """Return the percentages of the first pair of runs in a table of overlaps."""
    row = next(line for line in text.splitlines() if line.startswith("| uk") and "and en" in line)
    return [float(share) for share in re.findall(r"([\d.]+)%", row)]


# --- benchmarks


def test_bench_times_runs(place: Path) -> None:
    argv = ["bench", "--model", "model", "--calibration_data", "uk", "--no_peer", "--rounds", "1"]
    argv += ["--methods", "wanda", "--types", "2:4", "--nsamples", "2", "--seqlen", "32"]
    said = launched([*argv, "--save", "bench"], place)
    assert "| wanda | 2:4 |" in said.replace("  ", "")


def test_bench_sparse_splits_the_time_of_a_token(place: Path) -> None:
    argv = ["bench_sparse", "split", "--model", "model", "--rounds", "1"]
    said = launched([*argv, "--dtypes", "float32", "--shares", "0.5"], place)
    assert "milliseconds a token" in said and "| dense" in said
