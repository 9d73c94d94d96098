"""Make a model small for one language: trim its vocabulary, and quantize its weights with text.
For users who want a small model; main.py, trim and gguf offer each step by itself.

    langprune compress MODEL OUT --language uk [--megabytes N] [--for mlx] [--quantize q5_0]
        [--recover TOKENS]

The vocabulary is trimmed to the language, and the weights are quantized to llama.cpp's iq4_nl with
text in it, for other engines to q4_0, or with --megabytes to the types that lose least in so many
megabytes. A chat model first writes dialogues, on which it is quantized too. OUT is a dense folder
that transformers loads, and OUT.gguf the same model for llama.cpp, if requirements-gguf.txt is
installed. The model is trained only with --recover TOKENS. Each step is a command in a process of
its own; --dry_run prints them as a shell script and runs none. The same command continues an
interrupted one from the folder OUT-compress.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ...data.languages import language_text
from ...formats.registry import AUTO, EXPORTED, GRIDS
from ...run.flags import NATURAL, POSITIVE, build_parser, given, named
from ...util.cli import make_parser, split_argv
from ...util.errors import UserError
from ...util.files import check_new_folder, check_writable, exclusive_lock
from ..export.engines import ENGINES
from .recipe import Shell, script
from .steps import CONVERTER, first_steps, last_steps
from .work import ANY, PACKED, STEPS, Compression

INSTALL = "pip install -r requirements-gguf.txt, and run this command again"
OWN_FLAGS = ("debug", "dry_run", "table")  # they do not change the steps


def main(argv: list[str]) -> None:
    """Run the command; unknown flags go to main.py."""
    run = parse(argv)
    args = run.args
    if args.table:
        from .table import print_table

        print_table(run)
    elif args.dry_run:
        begin(run)
        print(script_of(run))
    else:
        fix = "Wait for its end, or name another OUT"
        held = UserError(f"--work_dir {args.work_dir}", "another command works there", fix)
        with exclusive_lock(Path(f"{Path(args.work_dir)}.lock"), held):
            begin(run)
            run_steps(run)


def run_steps(run: Compression) -> None:
    """Do all steps that are not finished."""
    try:
        first = [*first_steps(run, {})]
        count = len(first) + len(last_steps(run, {"model": run.args.model}))
        for number, step in enumerate(first_steps(run, run.values), 1):
            run.do(step, f"{number}/{count}")
        decide_size(run)
        run.keep()
        last = enumerate(last_steps(run, run.values), len(first) + 1)
        missing = [step.made for number, step in last if not run.do(step, f"{number}/{count}")]
    except (KeyboardInterrupt, SystemExit):
        print("the same command continues", file=sys.stderr, flush=True)
        raise
    if run.gguf and not find_spec(CONVERTER):
        print(f"for llama.cpp: {INSTALL}")
    if missing:
        problem = "the error above stopped it"
        raise UserError(", ".join(missing), problem, f"The model is saved in {run.args.out}")


def script_of(run: Compression) -> str:
    """Return the shell script of the steps."""
    is_made = all([run.is_done(step) for step in first_steps(run, run.values)])
    shell = {name: Shell(f'"${name}"') for name in run.values}
    first = [*first_steps(run, shell)]
    if run.args.megabytes and run.args.recover and not is_made:
        end = "The next steps depend on this model's size: print them once it is made"
        return script(run.line, first, end)
    end = f"For llama.cpp: {INSTALL}" if run.gguf and not find_spec(CONVERTER) else ""
    if is_made:
        decide_size(run)
    return script(run.line, [*first, *last_steps(run, shell)], end)


def decide_size(run: Compression) -> None:
    """Decide which part of the trimmed model's neurons or experts --megabytes removes.

    Raises UserError if its file is larger and --recover is not given.
    """
    from .size import check_size, removal
    from .texts import check_job

    args, facts, model = run.args, run.facts, run.values["model"]
    if args.megabytes and facts.smaller is None:
        data = [text for text, _ in facts.texts]
        job = check_job(run, model, data, facts.nsamples, facts.seqlen)
        if args.recover:
            facts.smaller = removal(job, args.quantize, args.megabytes)
        else:
            check_size(job, args.quantize, args.megabytes)
            facts.smaller = {}


def parse(argv: list[str]) -> Compression:
    """Read the flags. Raises UserError for mistakes that can be seen without torch."""
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if any(word.startswith("--minutes") for word in others):  # of earlier versions
        fix = "Leave it out: --recover TOKENS trains, and --nsamples 16 calibrates on less text"
        raise UserError("--minutes", "compress plans no time any more", fix)
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
    only_gguf = "iq4_nl" if args.target == [ANY] else EXPORTED
    args.quantize = args.quantize or (AUTO if by_size else only_gguf)
    args.work_dir = args.work_dir or f"{args.out}-compress"
    passed_on = [*others, *passed_on]
    parsed = build_parser().parse_args(["--model", args.model, *passed_on])
    if wrong := [name for name in named(set_by="compress") if given(parsed, name)]:
        raise UserError(f"--{wrong[0]}", "compress sets this flag", "Use the flags of compress")
    check_target(args)
    check_writable("--work_dir", args.work_dir)
    held = [path.name for path in Path(args.work_dir).glob("[!.]*")]
    if held and STEPS not in held and not args.table:
        problem = f"it holds {held[0]}"
        raise UserError(f"--work_dir {args.work_dir}", problem, "Name a new folder")
    words = [word for word in argv if word not in ("--dry_run", "--dry-run", "--table", "--debug")]
    return Compression(args, words, passed_on, parsed)


def check_target(args: argparse.Namespace) -> None:
    """Raise UserError if --for excludes other flags, or needs --recover."""
    names = " ".join(args.target)
    if args.quantize != EXPORTED and args.target != [ANY]:
        fix = f"Leave out --for {names}"
        raise UserError(f"--quantize {args.quantize}", "only llama.cpp and ollama run it", fix)
    if PACKED not in args.target:
        return
    if len(args.target) > 1:
        raise UserError("--for packed", "no other engine reads this format", "Name it alone")
    if args.megabytes:
        fix = "Leave out --for packed"
        raise UserError(f"--megabytes {args.megabytes}", "no GGUF is made", fix)
    if not args.recover:
        problem = "half of the weights are pruned, after which a model must be trained"
        raise UserError("--for packed", problem, "Add --recover TOKENS, such as 500000")


def begin(run: Compression) -> None:
    """Check all that needs no weights, and continue what the same command has begun."""
    from ...gguf import check_new
    from ...model.checkpoint import Checkpoint
    from ...model.device import pick_device
    from ...model.pretrained import load_config
    from ...packed import kernels
    from ...run.fingerprint import model_digest
    from ..export.__main__ import check_installed
    from .texts import find_facts

    args, parsed, device = run.args, run.parsed, pick_device(run.args.device)
    if PACKED in args.target and device.type == "cpu" and not kernels.supported():
        problem = "its kernels require an x86-64 processor with AVX2"
        raise UserError("--for packed", problem, "Leave the flag out")
    source = args.model, "--model", parsed.cache_dir, parsed.trust_remote_code
    run.device, run.checkpoint = str(device), Checkpoint(*source)
    run.config = load_config(run.checkpoint)
    flags = {name: value for name, value in vars(args).items() if name not in OWN_FLAGS}
    digest = model_digest(args.model, run.config)
    run.identity = flags | {"--": run.passed_on, "MODEL's files": digest}
    run.open()
    if not ("model" in run.ended and Path(args.out).exists()):
        check_new_folder("OUT", args.out)
        if run.gguf:
            check_new(Path(run.gguf), args.out)
        for new, engine in run.exports.items():
            check_new_folder("OUT", new)
            check_installed("--for", engine)
    run.facts = run.facts or find_facts(run)


def _parser() -> argparse.ArgumentParser:
    text = "Flags of prune may follow, such as --nsamples 64 --column body --seqlen 256."
    parser = make_parser("compress", __doc__, epilog=text)
    add, several = parser.add_argument, dict(nargs="+", metavar="SOURCE")
    add("model", help="Hub id or local folder of a dense model", metavar="MODEL")
    add("out", help="new folder for the small model; OUT.gguf is written beside it", metavar="OUT")
    add("--language", help="language of the FineWeb2 text, such as uk or pt-BR", metavar="TAG")
    add("--data", help="your own texts, as in --calibration_data", **several)
    add("--eval_data", help="test texts (default: the test text of the data)", **several)
    text = "train on so many tokens (default: 0)"
    add("--recover", help=text, type=NATURAL, default=0, metavar="TOKENS")
    text = "most dialogues that a chat model writes as calibration text (default: as many as the "
    add("--dialogues", help=text + "windows hold; 0: none)", type=NATURAL, metavar="N")
    text = "any: OUT and OUT.gguf; formats of export: these as well; packed: only for transformers "
    text += "on x86-64 CPUs, requires --recover (default: any)"
    targets = dict(choices=(ANY, PACKED, *ENGINES), nargs="+", default=[ANY])
    add("--for", help=text, dest="target", metavar="ENGINE", **targets)
    text = "q4_0: every engine; only for llama.cpp and ollama: iq4_nl, less loss at that size, "
    text += f"q3_k and q5_0, of three and five bits (default: iq4_nl; with --for: {EXPORTED}; with "
    text += "--megabytes and without --for: a type for each tensor)"
    add("--quantize", help=text, choices=[*GRIDS])
    text = "size limit of the GGUF file; below the smallest types, or that of --quantize, it "
    text += "requires --recover, and neurons or MoE experts are removed (default: none)"
    add("--megabytes", help=text, type=POSITIVE, metavar="N")
    add("--device", help="cuda:N, xpu:N or cpu (default: the first GPU, else cpu)")
    text = "folder of what the steps make, from which the same command continues "
    add("--work_dir", help=text + "(default: OUT-compress)", metavar="FOLDER")
    text = "print the steps as a shell script, and run none of them"
    add("--dry_run", action="store_true", help=text)
    text = "measure and print the table of a finished OUT again"
    add("--table", action="store_true", help=text)
    return parser
