"""Every name of launch.sh reaches its command."""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import tiny
from hub import Hub
from support import LIMIT, QUICK, ROOT, call, ended, launch, launched, python, results

from lib.commands import __main__ as console
from lib.util import processes
from lib.util.cli import CALLED, WAITING, typed

pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_texts(folder / "uk", train=30, test=4)
    english = tiny.sentences(30, seed=9)
    tiny.write_texts(folder / "en", train=english, test=english[:4])
    return folder


def test_every_name_of_the_list_is_there(place: Path) -> None:
    commands, _, _ = launched([], place).partition("recipes of the paper")
    names = re.findall(r"^  (\w+)", commands, re.MULTILINE)
    assert len(names) == len(console.NAMES)
    for name in names:
        assert find_spec("main" if name == "prune" else f"lib.commands.{name}"), name
    files = {file.stem for file in (ROOT / "lib/commands").iterdir() if file.suffix != ".md"}
    inner = set("__init__ __main__ __pycache__ demo_texts".split())
    assert files - inner < set(names)


def test_before_pip_install_one_line_says_so(place: Path) -> None:
    """Of an interpreter without any package."""
    bare = place / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -s "$@"\n', "utf-8")
    bare.chmod(0o755)
    for argv in (["demo"], ["prune", "--model", "model", "--eval_only"]):
        done = launch(argv, place, PYTHON=str(bare))
        assert done.status == 1 and done.err.count("\n") == 1, done.err
        assert "is not installed. Run pip install -r requirements.txt." in done.err


@pytest.mark.parametrize(
    "argv",
    [
        ["nosuch"],
        ["prune", "--model", "m", "--nosuch"],
        ["unpack", "a", "b", "--nosuch"],
    ],
)
def test_a_mistake_is_refused_in_one_line(argv: list[str], place: Path) -> None:
    done = launch(argv, place)
    assert done.status == 2 and not done.out
    assert done.err.count("\n") == 1 and (argv[0] in done.err or argv[-1] in done.err)


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
        }
        | {"README.md": b"---\nlicense: gemma\n---\n"},
    }
    with Hub(repositories) as found:
        yield found


@pytest.mark.full
def test_a_model_and_texts_of_the_hub(hub: Hub, place: Path) -> None:
    argv = ["prune", "--model", "owner/name", "--prune_method", "wanda", "--prune_on_c4"]
    argv += ["--cache_dir", "weights", *QUICK, "--save", "out", "--save_model", "p"]
    assert "perplexity ubertext: " in launched(argv, place, **hub.environment(place))
    assert list(Path("weights/models--owner--name/snapshots").glob("*/model.safetensors"))
    assert {"base_model: owner/name", "license: gemma"} < set(
        Path("p/README.md").read_text("utf-8").splitlines()
    )
    on_c4 = results("out")
    assert on_c4["calibration"]["name"] == "c4" and list(on_c4["perplexity"]) == ["ubertext"]
    assert any(path.endswith("en/c4-train.00000-of-01024.json.gz") for path in hub.asked)


def test_help_names_the_command_as_it_was_started(place: Path) -> None:
    assert launched(["unpack", "--help"], place).startswith("usage: bash launch.sh unpack ")
    assert call("--help").out.startswith("usage: main.py ")


# --- a reader that has seen enough, as `head` has, is no error

CODE = """
import sys
from lib.util import cli as command
sys.exit(command.run(lambda argv: print("ї", *range(10**6), sep="\\n")))
"""


@pytest.mark.parametrize("lines", ["10**6", "3"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(lines: str, tmp_path: Path) -> None:
    """Three lines fit into a buffer, and show only when that is written at the end.

    A letter that the reader can't read is written as its number.
    """
    process = python(CODE.replace("10**6", lines), folder=tmp_path, PYTHONIOENCODING="ascii")
    assert lines == "3" or process.stdout.readline() == "\\u0457\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=LIMIT) == 1


@pytest.mark.parametrize("name", ["", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_waiting_threads_spin_for_a_while_unless_the_user_says_otherwise(
    name: str, place: Path
) -> None:
    """A machine that others use too is not slowed down by threads that wait."""
    own = {name: "7"} if name else {}
    without = {key: value for key, value in os.environ.items() if key not in WAITING}
    code = "import os, sys; from lib.util import cli as command; seen = os.environ.get\n"
    code += "command.run(lambda _: print(*map(seen, sorted(command.WAITING))), [])"
    with mock.patch.dict(os.environ, without, clear=True):
        done = ended(python(code, folder=place, **own))
    expected = {"GOMP_SPINCOUNT": "10000"} if not name else own
    assert done.out.split() == [str(expected.get(each)) for each in sorted(WAITING)]


def test_commands_are_named_as_this_one_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CALLED, raising=False)
    assert [typed(each) for each in ("gguf", "prune")] == [
        "bash launch.sh gguf",
        "python main.py",
    ]
    monkeypatch.setenv(CALLED, "langprune")
    assert [typed(each) for each in ("gguf", "prune")] == [
        "langprune gguf",
        "langprune prune",
    ]


@pytest.mark.full
def test_commands_start_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lib").mkdir()  # a folder of the user's, which hides no module
    Path("lib/__init__.py").touch()
    assert processes.call("commands.unpack", "--help") == 0
    assert processes.call("commands.unpack", "nowhere", "new") == 1
    assert "nowhere" in capfd.readouterr().err
