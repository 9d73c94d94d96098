"""The table of flags: what it declares is what the parser, the checks and the README say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, call

from lib.run.flag import Flag, Span
from lib.run.flags import BEGIN, END, FLAGS, build_parser, method_options, table, write_table


def test_the_readmes_table_is_this_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(), "run: python -m lib.run.flags README.md"


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# Head\n{BEGIN}\n| old |\n{END}\ntail", "utf-8")
    for _ in range(2):
        write_table(file)
        assert file.read_text("utf-8") == f"# Head\n{BEGIN}\n{table()}\n{END}\ntail"


def test_the_table_names_every_flag_once() -> None:
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"--{name}" for name in FLAGS]
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


def test_the_command_prints_the_table() -> None:
    code = [sys.executable, "-m", "lib.run.flags"]
    shown = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == table()


def test_what_a_flag_names_is_a_flag() -> None:
    for flag in FLAGS.values():
        assert {*flag.needs, *flag.excludes} <= FLAGS.keys(), flag.name


def test_the_parsers_defaults_are_the_tables() -> None:
    args = build_parser().parse_args(["--model", "m"])
    assert vars(args).keys() == FLAGS.keys()
    assert [name for name, flag in FLAGS.items() if flag.is_given(args)] == ["model"]


@pytest.mark.parametrize(
    ("span", "inside", "outside", "text"),
    [
        (Span(1), [1, 10**9], [0, -1], "at least 1"),
        (Span(0, open="least"), [0.1], [0, -1], "above 0"),
        (Span(0, 1), [0, 0.5, 1], [-0.1, 1.1], "from 0 to 1"),
        (Span(0, 1, open="most"), [0, 0.99], [1], "from 0 to below 1"),
        (Span(0, 1, open="least most"), [0.5], [0, 1], "above 0 and below 1"),
    ],
)
def test_spans(span: Span, inside: list[float], outside: list[float], text: str) -> None:
    assert all(value in span for value in inside)
    assert not any(value in span for value in [*outside, float("nan")])
    assert str(span) == text


def test_options_of_the_method_are_those_that_are_given() -> None:
    parse = build_parser().parse_args
    assert method_options(parse(["--model", "m"])) == {}
    assert method_options(parse(["--model", "m", "--use_variant"])) == {"variant": True}
    assert method_options(parse(["--model", "m", "--blend", "0"])) == {"blend": 0.0}


SPANNED = [flag for flag in FLAGS.values() if flag.span]


@pytest.mark.parametrize("flag", SPANNED, ids=lambda flag: flag.name)
def test_values_outside_a_span_are_refused_in_one_line(flag: Flag) -> None:
    done = call("--model", "m", f"--{flag.name}", "-1")
    assert done.status == 2
    assert done.complaints[0].endswith(f"--{flag.name} -1: must be {flag.span}")


def test_help_needs_no_module_of_unix_alone(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fcntl'] = None; import main"
    code += "; main.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--calibration_data" in done.stdout
