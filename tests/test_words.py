"""What users read when nothing is wrong: help, runs, logs, cards. The words lie in tests/words."""

from __future__ import annotations

import html
import io
import re
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
from approval import Words, without_numbers
from huggingface_hub import ModelCard
from support import QUICK, ROOT, program_of, succeed, trimmed

from lib.commands import __main__ as console
from lib.run.card import converted_card, model_card
from lib.run.flags import build_parser
from lib.util import cli
from lib.util.errors import one_line
from lib.util.markdown import escape, padded_table
from lib.util.terminal import fitted

sys.path.append(str(ROOT / "tests/report"))

from made_up import results  # noqa: E402

PUBLISHED = """
model seed nsamples sparsity_ratio sparsity_type prune_method cache_dir use_variant save save_model
load_bit replace_sparse_layers eval_only prune_on_c4 device
""".split()
COMMANDS = ["main.py", *(name for name in console.NAMES if name != "prune")]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, words: Words) -> None:
    words("help.txt", succeed("--help", program=program_of(command)).out, command)


def test_the_list_of_commands(words: Words) -> None:
    words("help.txt", succeed(program=console.start).out, "all commands")
    words.only("help.txt", {"all commands", *COMMANDS})


def test_help_is_short() -> None:
    for action in build_parser()._actions:
        about = action.help.partition(" (default: ")[0].replace("%%", "%")
        assert len(about) <= (130 if action.dest in PUBLISHED else 100), action.dest


def test_hyphens_are_as_good_as_underscores() -> None:
    argv = "--model m-1 --prune-method=wanda --eval-data a-b_c --sparsity_type 2:4".split()
    args = build_parser().parse_args(argv)
    assert (args.model, args.prune_method, args.eval_data) == ("m-1", "wanda", ["a-b_c"])


# --- whole runs: each prints, logs and publishes what another does not

RUNS = {
    "pruned and trained": "--model model --prune_method wanda --calibration_data uk --recover 512",
    "trimmed and quantized": "--model small --quantize q4_0 --completions 1 "
    "--calibration_data uk --eval_data uk en",
    "packed": "--model model --prune_method sparsegpt --allocation error --quantize int4 "
    "--calibration_data uk",
    "neurons, resumed": "--model model --prune_method admm --sparsity_type neurons --resume kept "
    "--calibration_data uk=1 en=3",
    "experts, offloaded": "--model mixtral --prune_method contribution --sparsity_type experts "
    "--calibration_data uk --offload_folder away",
    "dialogues": "--model chat --quantize q4_0 --calibration_data said --completions 1",
    "pruned before": "--model model-pruned --teacher model --recover 64 --calibration_data uk",
    "evaluated": "--model model --eval_only --eval_data uk --eval_windows 3",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    pruned = tiny.tiny_llama(vocab_size=tiny.ROWS)
    for name, weight in pruned.named_parameters():
        if "_proj" in name:
            weight.data[:, ::2] = 0
    tiny.write_model(folder / "model-pruned", pruned)
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_model(folder / "chat", tokenizer=chats.tokenizer_with(chats.GEMMA))
    tiny.write_texts(folder / "uk", 40, 8)
    english = tiny.sentences(20, seed=9)
    tiny.write_texts(folder / "en", english, english[:4])
    chats.write(folder / "said", chats.some(80), chats.some(4, 1))
    trimmed(folder / "model", folder / "small", folder / "uk")
    return folder


@pytest.mark.usefixtures("at_place", "without_kernels")
@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, words: Words, place: Path, tmp_path: Path) -> None:
    saved = [] if name == "evaluated" else ["--save_model", tmp_path / "new"]
    done = succeed(*QUICK, *RUNS[name].split(), "--save", tmp_path / "out", *saved)
    assert not done.err
    (log,) = (tmp_path / "out").glob("log_*.txt")
    card = (tmp_path / "new/README.md").read_text("utf-8") if saved else ""
    table = "\n".join(line for line in done.out.splitlines() if line.startswith("|"))
    assert not card or f"\n{table}\n" in card
    words("runs.txt", without_numbers(done.out), f"{name}: printed")
    if name == "trimmed and quantized":
        words.terminal(done.out, "a run")
    logged = log.read_text("utf-8")
    noted = "".join(f"# {line}\n" for line in table.splitlines())
    assert noted in logged
    words("runs.txt", without_numbers(logged.replace(noted, "")), f"{name}: {log.name}")
    if card:
        head, _, text = card.replace(table, "TABLE").partition("\nmodel-index:\n")
        text = text.partition("\n---\n")[2]
        words("runs.txt", without_numbers(f"{head}\n...\n{text}"), f"{name}: card")
    assert str(tmp_path) not in card


def test_a_terminal_gets_lines_of_its_width(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stay whole, so that they can be copied; a pipe gets whole lines, for grep."""
    monkeypatch.setenv("COLUMNS", "60")
    page = (ROOT / "docs/vocabulary.md").read_text("utf-8")
    printed = re.search(r"```\n(--data .*?)```", page, re.DOTALL)[1]
    words.terminal(printed, "trim")
    command = f"python main.py --model {'m' * 60} --recover 5\n"
    for is_terminal in (True, False):
        with redirect_stdout(io.StringIO()) as out:
            out.isatty = lambda answer=is_terminal: answer
            assert cli.run(lambda _: print(command + printed, end=""), []) == 0
        assert out.getvalue() == command + (fitted(printed, 60) if is_terminal else printed)
    assert fitted(printed, 60) != printed


def test_a_long_table_is_fitted_at_once() -> None:
    """Also if a column is empty; each cell stays whole or is broken between words."""
    row = ["admm + recovery", "", "texts of " * 6, "23.45 (20.1 to 25.3)"]
    table = padded_table(["method", "", "calibrated on", "perplexity"], [row] * 200, left=3)
    start = time.process_time()
    shown = fitted(table, 60).splitlines()
    assert time.process_time() - start < 2
    assert {len(line) for line in shown} == {60} and shown[3].split("|")[2].isspace()


# --- cards of results that nobody has measured, and of what is converted from a folder

OWN = {"model": "owner/name", "prune_method": "wanda", "save_model": "out/small", "seed": 3}
FIGURES = {"kl": 0.12345, "kl_standard_error": 0.01, "top1_agreement": 0.87654}
FIGURES |= {"loss_change": 0.2, "loss_change_standard_error": float("nan")}
NASTY = "u|k <img src=x> [a](b)\u200b\n```"
LEFT = ["model.layers.0.mlp.down_proj.weight"]
TRAINED = {"teacher": "owner/name", "before": {"uk": {"perplexity": 20.0}}, "text": {"name": "uk"}}


def measured(**more: Any) -> dict[str, Any]:
    """Results whose test has more figures."""
    return {"evaluation": [made()["evaluation"][0] | more]}


def made(flags: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    found = results("wanda", {"uk": 12.34567}, on="uk", model="owner/name", seed=3)
    return found | {"flags": OWN | (flags or {}), "sparsity": {"overall": 0.4996}} | changes


CARDS = {
    "pruned": (made(), ["ubertext", "c4:no", "fineweb2:deu_Latn"]),
    "flags of value zero": (
        made(
            {"recover": 9, "recover_ce_weight": 0.0, "sparsity_ratio": 0.0, "seed": 0}
            | {"batch_size": 2, "use_variant": False, "recover_rank": None}
        ),
        [],
    ),
    "dense figures, trained": (
        made(
            **measured(dense={"perplexity": 10.0}, **FIGURES),
            recovery=TRAINED,
            saved_bytes=5e6,
            dense_bytes=9e6,
        ),
        [],
    ),
    "dense bits per byte": (made(**measured(dense={"perplexity": 9, "bits_per_byte": 0.1})), []),
    "compared on few windows": (
        made(**measured(dense={"perplexity": 9.0}, compared_perplexity=13.0, compared_windows=2)),
        [],
    ),
    "packed": (made({"replace_sparse_layers": True, "quantize": "int4"}, packed={"bits": 4}), []),
    "q4_0, trained": (
        made(sparsity_type=None, recovery=TRAINED | {"before": {}}, quantized={"format": "q4_0"}),
        ["c4:de"],
    ),
    "q4_0, some left, training did not help": (
        made(
            sparsity_type=None,
            recovery=TRAINED | {"before": {}, "kept": {"tokens": 0, "loss": 1.0}},
            quantized={"format": "q4_0", "left": LEFT},
        ),
        [],
    ),
    "neurons, trimmed, a note": (
        made(
            sparsity_type="neurons",
            neurons={"before": 64, "after": 48, "weights_before": 8, "weights_after": 7},
            vocabulary={"rows": 3000, "rows_before": 9000, "note": "Fewer tokens."},
            notes=["a|b"],
        ),
        [],
    ),
    "nasty names": (made({"eval_data": [NASTY]}, **measured(name=NASTY), notes=[NASTY]), [NASTY]),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card(name: str, words: Words) -> None:
    found, sources = CARDS[name]
    card = model_card(found, sources)
    start, end = card.index("model-index:"), card.index("\n---\n", 4)
    words("cards.txt", card if name == "pruned" else card[:start] + "..." + card[end:], name)
    parsed = ModelCard(card)  # as the hub reads it
    assert parsed.data.model_name == "small" and parsed.data.tags[0] == "langprune"
    languages = {
        "pruned": ["uk", "no", "de"]
    }  # and no is not the truth value that YAML makes of it
    assert parsed.data.language == languages.get(name, parsed.data.language)
    command, _, after = parsed.text.partition("```bash\n")[2].partition("\n```\n")
    assert "\n" not in command and after.count("```") == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_card_of_a_local_model(words: Words) -> None:
    """It hands on licence and base; names stay, paths and texts of tests do not."""
    for name in ("base", "broken", "private/uk", "private/dense"):
        Path(name).mkdir(parents=True)
    head = "license: gemma\nbase_model: google/gemma"
    Path("base/README.md").write_text(f"---\n{head}\n---\n# Base\n\nTheir words.\n")
    Path("broken/README.md").write_text("---\n[\n---\n")
    for name in ("base", "broken"):
        words("cards.txt", model_card(made(model=name), []), f"of a local model, {name}")
    private = f"{Path().absolute()}/private/"
    flags = {"model": f"{private}pruned", "teacher": f"{private}dense", "resume": f"{private}r"}
    flags |= {"calibration_data": [f"{private}uk=0.5", "c4=0.5"], "save_model": f"{private}small"}
    found = made(flags, model=f"{private}pruned")
    found["completions"] = [{"test": "uk", "prompt": "Private words", "model": "here"}]
    text = model_card(found, [f"{private}uk", f"{private}gone"])
    assert "private" not in text.lower()
    words("cards.txt", text, "of private folders")


@pytest.mark.usefixtures("elsewhere")
def test_a_card_of_what_was_converted(words: Words) -> None:
    theirs = "---\nlicense: gemma\nbase_model: google/gemma\n---\n# Base\n\nTheir words.\n"
    found = {name: model_card(*CARDS[name]) for name in ("pruned", "q4_0, trained")}
    for folder, card in (found | {"of others": theirs, "none": None}).items():
        Path(folder).mkdir()
        if card:
            Path(folder, "README.md").write_text(card)
        for kind in ("q4_0", "q8_0") if folder == "q4_0, trained" else ("q8_0",):
            about = dict(what=f"GGUF ({kind})", tag="gguf", kind=kind, changed="the head")
            card = converted_card(folder, how="llama-cli -m Small.gguf", **about)
            words("cards.txt", card, f"{kind} of {folder}")


@pytest.mark.parametrize(
    "text", [NASTY + " \\ _d_ $e$ ~~f~~ \x1b[31m", "\n|\n", "```\n", "<!-- ", "a\\", "\r\n\u2028x"]
)
def test_any_text_is_plain_words(text: str) -> None:
    cell = escape(text)
    assert cell and len(cell.splitlines()) == 1
    plain = re.sub(r"\\.", "", cell).replace("&#124;", "")  # what a reader gives a meaning
    assert not re.search(r"[`*_\[\]~#$|<>\\\x1b]|://", plain)
    assert html.unescape(re.sub(r"\\(.)", r"\1", cell)).replace("–", "") == one_line(text)
    assert escape('It\'s (so) 5 % "q_proj"; می‌خواهم') == 'It\'s (so) 5 % "q_proj"; می‌خواهم'
