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
from hub import Hub
from support import QUICK, ROOT, launch, launched, results

from lib.run.flags import build_parser, check_flags
from lib.run.texts import named_sources

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
    calibrated, _, measured = ([source.text for source in some] for some in named_sources(args))
    assert (calibrated, measured) == (["c4" if name == "c4" else "ubertext"], ["ubertext"])


@pytest.mark.parametrize(
    "argv", [["nosuch"], ["dense"], ["unstructured", "--device", "cpu"], ["vocabulary", "model"]]
)
def test_a_mistake_is_refused_in_one_line(argv: list[str], place: Path) -> None:
    done = launch(argv, place)
    assert done.status == 2 and not done.out
    assert done.err.count("\n") == 1 and argv[0] in done.err


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


def test_a_recipe_with_a_model_and_texts_of_the_hub(hub: Hub, place: Path) -> None:
    argv = ["c4", "owner/name", "--cache_dir", "weights", *QUICK, "--save_model", "p"]
    assert "perplexity ubertext: " in launched(argv, place, **hub.environment(place))
    assert list(Path("weights/models--owner--name/snapshots").glob("*/model.safetensors"))
    assert "base_model: owner/name\n" in Path("p/README.md").read_text("utf-8")
    on_c4 = results("out/c4")
    assert on_c4["calibration"]["name"] == "c4" and list(on_c4["perplexity"]) == ["ubertext"]
    assert any(path.endswith("en/c4-train.00000-of-01024.json.gz") for path in hub.asked)
