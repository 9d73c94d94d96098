"""Completions: any text at all is plain words in a Markdown cell, and runs stand side by side."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from lib.report.completion_tables import completions_of_run, completions_of_runs, terminal_lines
from lib.report.markdown import escape
from lib.report.results import Run
from lib.util.terminal import one_line

NASTY = "a|b `c` <script>x</script>\n\n# d\t*e* _f_ [g](http://h.i) &amp; \\| $j$ ~~k~~ \x1b[31m l"


def cells(line: str) -> list[str]:
    """Of a table's line, as a reader of Markdown cuts it: at every | that no backslash precedes."""
    assert line.startswith("| ") and line.endswith(" |")
    return [cell.strip() for cell in line[1:-1].replace("\\|", "\0").split("|")]


@pytest.mark.parametrize(
    "text", [NASTY, "\n|\n", "```\n", "<!-- ", "\\", "a\\", "|", "\r\n\u2028x"]
)
def test_any_text_is_one_cell(text: str) -> None:
    cell = escape(text)
    assert cell and len(cell.splitlines()) == 1
    assert cells(f"| {cell} | x |") == [cell, "x"]
    plain = re.sub(r"\\.", "", cell).replace("&#124;", "")  # what a reader gives a meaning
    assert not re.search(r"[`*_\[\]~#$|<>\\\x1b]|://", plain)
    assert html.unescape(re.sub(r"\\(.)", r"\1", cell)).replace("–", "") == one_line(text)


def test_words_stay_as_they_are() -> None:
    for text in ("Було, є й буде.", 'It\'s (so) 5 % "good" - or not; why?', "می‌خواهم"):
        assert escape(text) == text
    assert escape("") == escape(" \n") == "–"
    assert escape("q_proj __a__ b_ _c") == r"q_proj \_\_a\_\_ b\_ \_c"


def test_the_dense_and_the_pruned_model_stand_side_by_side() -> None:
    one = {"test": "uk", "prompt": "Був", "dense": " собі", "model": " | "}
    lines = completions_of_run([one]).splitlines()
    assert cells(lines[0]) == ["test text", "prompt", "dense model", "this model"]
    assert cells(lines[2]) == ["uk", "Був", "собі", "&#124;"]
    alone = completions_of_run([{"test": "uk", "prompt": "Був", "model": "x"}]).splitlines()
    assert cells(alone[0]) == ["test text", "prompt", "this model"]


def test_on_a_terminal() -> None:
    one = {"test": "uk", "prompt": "Був\x1b[2J", "dense": "x" * 300, "model": "a\nb"}
    lines = terminal_lines([one, one | {"prompt": "other"}, one | {"test": "en"}])
    assert [line[:12] for line in lines[3:]] == ["en: Був[2J .", "  dense mode", "  this model"]
    assert lines[0] == "uk: Був[2J ..." and lines[2] == "  this model: a b"
    assert len(lines[1]) < 130


def run(
    method: str, by_prompt: dict[str, dict[str, str]], kind: str = "2:4", **more: object
) -> Run:
    """`by_prompt`: {prompt: {"dense" or "model": completion}}."""
    dense = method == "dense"
    completions = [{"test": "uk", "prompt": key} | texts for key, texts in by_prompt.items()]
    made = {
        "model": "models/tiny",
        "method": method,
        "sparsity_type": None if dense else kind,
        "sparsity_ratio": None if dense else 0.5,
        "calibration": None if dense else {"name": "uk", "sources": []},
        "evaluation": [{"name": "uk", "digest": "d", "perplexity": 1.0}],
        "completions": completions,
    }
    return Run(Path(method), made | more)


def test_runs_completions_of_run() -> None:
    dense = run("dense", {"A": {"model": "dense a"}, "B": {"model": "dense b"}})
    both = run("admm", {"A": {"dense": "dense a", "model": "a|"}, "B": {"model": "b"}})
    fewer = run("wanda", {"A": {"dense": "dense a", "model": "c"}}, "unstructured")
    none = run("magnitude", {})
    lines = completions_of_runs([both, none, fewer, dense]).splitlines()
    assert lines[0] == "### Completions: uk"
    table = [cells(line) for line in lines if line.startswith("|")]
    assert table[0] == ["method", "type", "calibrated on", "A …", "B …"]
    assert table[2:] == [
        ["dense", "–", "–", "dense a", "dense b"],
        ["admm", "2:4", "uk", "a&#124;", "b"],
        ["wanda", "50%", "uk", "c", ""],
    ]
    without = completions_of_runs([both, fewer]).splitlines()
    assert cells(without[4])[3] == "dense a"
    assert completions_of_runs([none]) == ""


def test_another_seed_adds_no_row_and_another_flag_is_named() -> None:
    words = {"A": {"dense": "d", "model": "m"}}
    seeds = [run("admm", words, seed=seed, settings={"blend": 1}) for seed in (0, 1)]
    other = run("admm", words, seed=0, settings={"blend": 0.5})
    lines = [line for line in completions_of_runs([*seeds, other]).splitlines() if "admm" in line]
    assert sorted(cells(line)[2] for line in lines) == ["uk, blend 0.5", "uk, blend 1"]
