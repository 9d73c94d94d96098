"""The first command of each page runs, offline, with tiny stand-ins for models and texts."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
from support import ROOT, program_of, succeed

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/vocabulary")]

import ggufs  # noqa: E402
import kinds  # noqa: E402
import test_docs  # noqa: E402
import tiny  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("elsewhere")]
# others take minutes, or tokenizers and packages of their own, and have tests of their own
RUN = "prune", "trim", "compare"
FIRST = {
    page.relative_to(ROOT): found[0][1:]
    for page, commands in groupby(test_docs.printed_commands(), lambda command: command[0])
    if "results" not in page.parts and (found := [each for each in commands if each[1] in RUN])
}
TEXTS = "--data", "--calibration_data", "--calibration", "--eval_data", "--language"
NUMBERS = {"--nsamples": "2", "--seqlen": "32", "--recover": "256", "--eval_windows": "2"}
SMALL = ["--device", "cpu", "--completions", "0", *"--seqlen 32 --nsamples 2".split()]
METHOD = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def stand_ins(name: str, words: list[str]) -> list[str]:
    """The words of a command with the model, the texts and the numbers of this machine."""
    argv, flag, texts = [], "", set()
    for word in words:
        if word.startswith("--"):
            flag, texts = word, set()
            word = "--data" if word == "--language" else word
        elif flag in TEXTS:
            word = "en" if word in ("en", "texts/en") else "uk"
            if word in texts:
                continue
            texts.add(word)
        elif flag in ("--model", "--models") or not (flag or argv or word.endswith(".gguf")):
            word = "model"
        elif not flag and (name == "compare" or not argv):
            ggufs.model(Path(word))
        else:
            word = NUMBERS.get(flag, word)
        argv.append(word)
    if name == "prune" and not {*TEXTS, "--eval_only"} & {*argv}:
        argv += ["--calibration_data", "uk", "--eval_data", "uk"]  # the defaults are of the Hub
    more = {"compare": ["--passages", "2"], "trim": ["--most_cost", "9999%"], "prune": SMALL}
    return [*argv, *more[name]]


@pytest.mark.parametrize("page", FIRST, ids=str)
def test_the_first_command_of_a_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, words = FIRST[page]
    if any(word.endswith(".gguf") for word in words) and not find_spec("xllamacpp"):
        pytest.skip("xllamacpp is not installed")
    monkeypatch.setattr("lib.vocabulary.choice.MULTIPLE", 8)  # of rows, which are few here
    numbers = dict(vocab_size=521, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tiny.write_model("model", tiny.tiny_llama(**numbers), kinds.byte_level(regex=False))
    for language, own in (("uk", kinds.UK), ("en", ggufs.EN)):
        texts = kinds.texts(own[:12], 60, 1), kinds.texts(own, 12, 2)
        tiny.write_texts(Path(language), *texts)
    Path("mine.py").write_text(METHOD.split("```python\n")[1].split("```")[0], "utf-8")
    succeed(*stand_ins(name, words), program=program_of(name))
