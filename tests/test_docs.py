"""The tables of the pages are what the raw figures give, and their commands are accepted."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from support import ROOT, program_of

from lib import eval as evaluation
from lib.commands.__main__ import NAMES
from lib.data.sources import BUILT_IN
from lib.methods.gptq import GPTQ
from lib.methods.registry import METHODS, method_of, parameters
from lib.run.flags import build_parser, mistakes
from lib.util.cli import split_argv
from lib.util.errors import UserError
from lib.vocabulary import choice as token_choice

sys.path.append(str(ROOT / "benchmarks"))
TODAY = {
    "vocabulary": token_choice.REVISION,
    "quantize": GPTQ.revision,
    "figures": evaluation.REVISION,
    **{name: method_of(name).revision for name in METHODS},
}
RAW = re.compile(
    r"([\w./*-]*)(?:\{([\w,.-]*)\}([\w./-]*))?\.(json|csv)"
)  # files of a table's source

import flags_table  # noqa: E402
import tables  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("lib/**/*.md")]
RECIPES = ["sparsegpt", "sparsegpt-2:4", "dense", "c4"]  # of launch.sh, which adds --model
STARTS = "main.py", "launch.sh", "langprune"
INLINE = re.compile(r"`((?:bash launch\.sh|python main\.py|langprune) [^`\n]* --[^`\n]*)`")
BLOCK = re.compile(r"(?ms)^```bash\n(.*?)^```")


def printed_commands() -> Iterator[tuple[Path, str, list[str]]]:
    """Yield the page, the command's name and its words, of each in shell code, or in a sentence or
    table if it has flags."""
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = "\n".join([*BLOCK.findall(text), *INLINE.findall(text)]).replace("\\\n", " ")
        for line in blocks.splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
            words.whitespace_split, joined = True, {"|", "||", "&&", ";", "&"}
            for is_joint, part in groupby(words, joined.__contains__):
                part = [word.strip("[]") for word in part]
                starts = [i for i, word in enumerate(part[:20]) if Path(word).name in STARTS]
                if is_joint or not starts or "..." in part or "pip" in part[: starts[0]]:
                    continue
                name, *rest = ["prune"] * part[starts[0]].endswith("main.py") + part[
                    starts[0] + 1 :
                ]
                yield page, name, rest


class Parsed(Exception):
    """The command has accepted its flags."""


def test_every_printed_command_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed; nothing of it runs."""

    def stop(self: argparse.ArgumentParser, *words: object) -> None:
        parse_args(self, *words)
        raise Parsed

    parse_args, names = argparse.ArgumentParser.parse_args, set()
    for page, name, words in printed_commands():
        names.add(name)
        own, passed_on = split_argv(words)
        if name == "prune" or name in RECIPES or passed_on:  # the flags of main.py
            model = [] if name == "prune" else ["--model", "m"]
            flags = build_parser().parse_args([*model, *(passed_on or own)])
            assert name != "prune" or not [*mistakes(flags)], (page, words)
        if name != "prune" and name not in RECIPES:
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                program_of(name)(own)
    assert names.issuperset({"prune", "trim", "sweep", "report", "compress", "sparsegpt"})
    assert names <= {*NAMES, *RECIPES}


def test_printed_commands_read_texts_that_a_reader_has() -> None:
    """A text of the Hub, a folder in texts/ or of the demo, or a name to be replaced.

    Tables of docs/results were made with folders that its first page names.
    """
    built_in = "|".join(name.partition(":")[0] for name in BUILT_IN)
    known = re.compile(rf"[A-Z]+(:test)?|(texts|demo)/\S+|({built_in})(:\w+)?|my\.csv:.*")
    flags = {"--data", "--calibration_data", "--calibration", "--eval_data"}
    count = 0
    for page, name, words in printed_commands():
        reads = None
        for word in words if "results" not in page.parts else ():
            reads = word in flags if word.startswith("--") else reads
            for text in word.split(",") if reads and word not in flags else ():
                assert known.fullmatch(text.partition("=")[0]), (page, name, text)
                count += 1
    assert count > 20


def test_no_table_is_stale() -> None:
    tables.main(["--check"])
    flags_table.main(["--check"])


def test_a_changed_table_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(tables.filled("A\n\n<!-- table: types-smollm2 () -->\n<!-- end -->\n"), "utf-8")
    tables.main(["--check"])
    page.write_text(page.read_text("utf-8").replace("0.0", "1.0"), "utf-8")
    with pytest.raises(UserError, match=r"README\.md"):
        tables.main(["--check"])
    with pytest.raises(UserError, match="no-such"):
        tables.filled("<!-- table: no-such () -->\n<!-- end -->")


def test_the_best_value_of_a_column_is_bold() -> None:
    head = {"Model": "", "KL ↓": ".2f", "Correct ↑": ".0%"}
    rows = [["dense", 0.0, 1.0], ["a", (0.1, 0.02), 0.5], ["b", 0.2, 0.5], ["c", None, 0.4]]
    lines = tables.grid(head, rows, references=1).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["dense", "0.00", "100%"]
    assert cells[1] == ["a", "**0.10 ± 0.02**", "**50%**"]
    assert cells[2] == ["b", "0.20", "**50%**"]
    assert cells[3] == ["c", "", "40%"]


def test_every_table_has_its_raw_figures() -> None:
    for name, table in tables.specified().items():
        assert tables.made(table).count("\n") > 2 and ":" in table.source, name


def test_a_column_without_figures_is_a_mistake() -> None:
    table = tables.specified()["passes"]._replace(columns="Model = {nosuch:.1f}")
    with pytest.raises(AssertionError, match="Model"):
        tables.made(table)


def test_a_first_run_on_a_gpu_ends_the_line_about_it() -> None:
    if any(tables.RESULTS.rglob("gpu.json")):
        assert "UNTRIED" not in (ROOT / "lib/run/check.py").read_text("utf-8")


def test_the_page_of_methods_has_their_parameters() -> None:
    page = (ROOT / "docs/methods.md").read_text("utf-8")
    for name in METHODS:
        for parameter, value in parameters(method_of(name)).items():
            assert f"`{parameter}={value:g}`" in page, name


def test_figures_that_today_gives_otherwise_name_their_version() -> None:
    """revisions.json has what made a raw file; all other files are of version 0.3.0 or older."""
    record, specified = tables.raw("revisions.json"), tables.specified()

    def is_named(file: str, text: str) -> bool:
        made = record["files"].get(file, {"before": 0})
        return "ersion 0.3.0" in text or all(
            TODAY.get(name) == revision
            or f"{name} {revision}" in record["same"]
            or f"revision {revision} of the {name}" in text
            for name, revision in made.items()
        )

    stale = []
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        head, *sections = re.split(r"(?m)^## ", page.read_text("utf-8"))
        for section in sections:
            for name in re.findall(r"<!-- table: ([\w-]+)", section):
                source = specified[name].source.rpartition(": ")[0]
                files = [
                    str(file.relative_to(tables.RESULTS))
                    for start, inside, end, kind in RAW.findall(source)
                    for part in inside.split(",")
                    for file in tables.RESULTS.glob(f"{start}{part}{end}.{kind}")
                ]
                assert files, f"{name} names no file"
                if not all(is_named(file, " ".join((head + section).split())) for file in files):
                    stale.append(f"{page.relative_to(ROOT)}: {name}")
    assert not stale, f"say which version made them, or measure again: {stale}"
