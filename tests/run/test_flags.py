"""The command line as a reader of --help meets it."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator

import pytest
from support import ROOT

from lib.run.flags import FLAGS, build_parser, check_flags, command_words, mistakes, named, without
from lib.util.errors import FIELD, UserError, fields_named, spelled

PUBLISHED = """
model seed nsamples sparsity_ratio sparsity_type prune_method cache_dir use_variant save save_model
load_bit replace_sparse_layers eval_only prune_on_c4 device
""".split()
GROUPS = """
model, data, pruning, quantization and packing, recovery training, evaluation, output,
execution
"""


def test_help_is_short_and_in_groups() -> None:
    parser = build_parser()
    text = parser.format_help()
    assert text.startswith("usage: main.py --model MODEL [options]\n")
    places = [text.index(f"\n{' '.join(name.split())}:\n") for name in GROUPS.split(",")]
    assert places == sorted(places)
    assert text.count("python main.py --model ") == 4  # examples
    for action in parser._actions:
        about = action.help.partition(" (default: ")[0].replace("%%", "%")
        assert len(about) <= (130 if action.dest in PUBLISHED else 100), action.dest


def test_hyphens_are_as_good_as_underscores() -> None:
    argv = [
        "--model",
        "m-1",
        "--prune-method=wanda",
        "--eval-data",
        "a-b_c",
        "--sparsity_type",
        "2:4",
    ]
    args = build_parser().parse_args(argv)
    assert (args.model, args.prune_method, args.eval_data) == ("m-1", "wanda", ["a-b_c"])


def test_a_text_is_named_in_three_ways() -> None:
    """What a run records, and so resumes and skips, is the same."""
    named_source = ["--calibration_data", "fineweb2:ukr_Cyrl", "fineweb"]
    args = [
        build_parser().parse_args(["--model", "m", "--prune_method", "wanda", *words])
        for words in (named_source, ["--data", *named_source[1:]], ["--language", "uk", "en"])
    ]
    assert args[0] == args[1] == args[2]
    words = command_words(vars(args[2]))
    assert words[words.index("--calibration_data") :][:3] == named_source


@pytest.mark.parametrize(
    "words, mistake",
    [
        ("--language uk --data texts", "--data: not allowed with argument --language"),
        ("--data texts --calibration_data c4", "not allowed with argument --data"),
        ("--language martian", "martian: it is not a language. Give a BCP 47 tag, such as uk"),
        ("--data texts --prune_on_c4", "Leave out --calibration_data texts."),
    ],
)
def test_a_text_is_named_once(words: str, mistake: str, capsys: pytest.CaptureFixture) -> None:
    parser = build_parser()
    with pytest.raises(SystemExit):
        check_flags(parser, parser.parse_args(["--model", "m", *words.split()]))
    assert mistake in capsys.readouterr().err


def literals(tree: ast.AST) -> Iterator[tuple[int, list[object]]]:
    """Yield line and members of each literal list, tuple, set, mapping and string of words.

    Members that are unpacked or computed are left out: what is written there counts.
    """
    for node in ast.walk(tree):
        members = []
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            members = [each for each in node.elts if not isinstance(each, ast.Starred)]
        elif isinstance(node, ast.Dict):
            members = [each for each in node.keys if each]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value.split()
        yield getattr(node, "lineno", 0), [getattr(each, "value", None) for each in members]


def test_a_flag_is_one_entry() -> None:
    """No module besides flags.py lists names of flags: it asks `named` for those with a fact.

    A list that holds anything else, such as the value of a flag, is a command line.
    """
    names = {flag.name for flag in FLAGS}
    words = {f"--{name}" for name in names}
    lists = [
        f"{file.relative_to(ROOT)}:{line} {members}"
        for file in (ROOT / "main.py", *(ROOT / "lib").rglob("*.py"))
        for line, members in literals(ast.parse(file.read_text("utf-8")))
        if file.name != "flags.py" and len(members) > 1
        if names.issuperset(members) or words.issuperset(members)
    ]
    assert not lists, "\n".join(lists)


def test_errors_name_fields() -> None:
    """A message has `{--nsamples}`, main.py's flag, for which each front end has its own word."""
    text = "".join(file.read_text("utf-8") for file in (ROOT / "lib").rglob("*.py"))
    fields = set(FIELD.findall(text))
    words = " ".join(re.findall(r"(?s)fields_named\((.*?)\)\n", text))
    assert "nsamples" in fields <= {flag.name for flag in FLAGS}
    assert {"prune_method"} <= set(re.findall(r"(\w+)=", words)) <= fields
    error = UserError("{--nsamples} 3", "{x} has less", "Give fewer {--nsamples} or {--seqlen} 2")
    assert str(error) == "--nsamples 3: {x} has less. Give fewer --nsamples or --seqlen 2."
    with pytest.raises(UserError) as caught, fields_named("", nsamples="windows"):
        assert spelled("{--nsamples}") == "windows"
        raise error.inside("down")
    assert spelled("{--nsamples}") == "--nsamples"
    found = pickle.loads(pickle.dumps(caught.value))
    assert str(found) == "down: windows 3: {x} has less. Give fewer windows or seqlen 2."


def test_a_front_end_gives_no_advice_that_names_a_flag_it_lacks() -> None:
    """Messages about texts, which most commands can print, name main.py's own flags as fields."""
    files = (ROOT / "lib/data").glob("*.py")
    literals = re.findall(r'"[^"\n]*(?<!\{)--(\w+)', "".join(f.read_text("utf-8") for f in files))
    assert set(literals) <= {"column", "language"}
    advice = "Give text, or add {--no_chat_template}, or name {--eval_data}"
    for names, fix in (
        (dict(eval_data=None), "Give text, or add --no_chat_template"),
        (dict(eval_data=None, no_chat_template=None), "Give text"),
        (dict(eval_data="--data"), "Give text, or add --no_chat_template, or name --data"),
    ):
        with fields_named(**names):
            assert UserError("IN", "it is small", advice).fix == fix


def test_a_dense_run_takes_the_rest_of_the_flags() -> None:
    words = "--prune_method ria --method_args alpha=0.3 --allocation error --save_masks F"
    words += " --resume R --save_model M --text_only --recover 9 --recover_rank 2 --seqlen 8"
    left = without(words.split(), named(changes=True))
    assert left == ["--seqlen", "8"]
    assert not [*mistakes(build_parser().parse_args(["--model", "m", "--eval_only", *left]))]
