"""The steps of a run, in the order in which main.run takes them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.eval import COMPARED_POSITIONS, perplexities, perplexity, some_logits
from lib.methods.sparsity import NEURONS, SMALLER
from lib.model.blocks import BlockRunner
from lib.model.pretrained import footprint, parameter_bytes
from lib.model.reference import (
    DenseReference,
    compared_windows,
    dense_states,
    local_windows,
    shared_states,
    tail_of,
)
from lib.model.rows import keep_rows_
from lib.packed.formats import FORMATS, Q4_0
from lib.prune import Pruner, first_of
from lib.pruning.allocation import Allocation, keep_allocation, kept_allocation, uniform
from lib.pruning.by_error import by_error
from lib.pruning.check import measure
from lib.pruning.experts import ExpertPruner
from lib.pruning.neurons import NeuronPruner
from lib.pruning.quantise import LlamaCppQuantiser, Quantiser, check_q4_0, q4_0_weights
from lib.recover import Recoverer
from lib.run import plots, tasks
from lib.run.job import Job
from lib.run.load import load
from lib.run.record import evaluation_record, finish_results, keep_other_results, write_log
from lib.run.results import UNMEASURED, write_results
from lib.run.save import close_store, save, write_card
from lib.run.teacher import load_teacher
from lib.run.texts import resolve_bos
from lib.sparse import check_same_outputs, pack_, packed_weights, relative_difference
from lib.util.errors import UserError
from lib.util.host import gib
from lib.util.progress import progress
from lib.vocabulary import PROOF_TOKENS

__all__ = ["close_store", "load", "load_teacher", "resolve_bos", "save"]  # steps of main.run too


class Reached:
    """What pruning reached, for checks of later steps."""

    sparsity = None  # by linear, if it must be reached
    left_dense: frozenset[str] = frozenset()  # names of linears


def trim(job: Job, runner: BlockRunner) -> None:
    """Remove the rows of dropped tokens, and check that the others keep their logits."""
    model, vocabulary = runner.model, job.vocabulary
    window = job.texts.tests[0].windows[:1, :PROOF_TOKENS].to(job.device)
    with job.timed("trim"):
        size = footprint(model)
        rows = vocabulary.rows.to(job.device)
        before = some_logits(model, rows[window]).index_select(-1, rows)
        keep_rows_(model, vocabulary.rows)
        after, what = some_logits(model, window), "--trim_vocabulary: whole and trimmed"
        difference = check_same_outputs(before, after, what, least=1e-5)
    saved = size - footprint(model)
    vocabulary.facts |= {"bytes_dropped": saved, "logits_differ": difference}
    job.print(
        f"trimmed: {gib(size)} before, {gib(size - saved)} now; logits differ by {difference:.1g}"
    )


def dense_reference(job: Job, dense: BlockRunner) -> DenseReference:
    """Return the dense model's hidden states on the test windows, which evaluation compares with.

    The runs of a sweep compute them once.
    """
    dist, sets = job.dist, [test.windows for test in job.texts.tests]
    windows = sum(len(local_windows(len(each), dist)) for each in sets)

    def compute():
        with job.timed("dense"), progress(windows, "dense", "window", dist.is_main) as bar:
            return dense_states(dense, sets, bar)

    shares = job.shared and dist.size == 1
    states = shared_states(job.shared, job.dense_key, compute) if shares else compute()
    return DenseReference(tail_of(dense), states)


def prune(job: Job, runner: BlockRunner) -> Reached:
    """Prune the linears of the blocks, or neurons or experts, and check what was reached."""
    args, is_main, reached, size = job.args, job.dist.is_main, Reached(), 0
    if args.sparsity_type in SMALLER:
        size = parameter_bytes(runner.model, runner.save_dtype)
        kind = NeuronPruner if args.sparsity_type == NEURONS else ExpertPruner
        pruner = kind(runner, job.method, job.layout, job.left, args.seed)
    else:
        allocation = allocate(job, runner)
        pruner = Pruner(runner, job.method, allocation)
        if not args.use_variant:  # which only comes near the ratio
            reached.sparsity = allocation.sparsity
    with job.timed("prune"), progress(len(runner.blocks), "pruning", "block", is_main) as bar:
        pruned = pruner.run(job.texts.windows, bar)
    if not is_main:
        return reached
    print(*pruned.summary(), sep="\n", flush=True)
    job.results["notes"] = pruned.summary()[1:]
    if args.sparsity_type in SMALLER:
        job.results[args.sparsity_type] = pruned.record() | {
            "bytes_before": size,
            "bytes_after": parameter_bytes(runner.model, runner.save_dtype),
        }
    else:
        reached.left_dense = frozenset(pruned.left_dense)
    measured = measure(runner, reached.sparsity, reached.left_dense)
    job.results["sparsity"] = measured.shares()
    return reached


def allocate(job: Job, runner: BlockRunner) -> Allocation:
    """Return the sparsity of every linear."""
    args = job.args
    if args.allocation == "uniform":
        return uniform(runner, job.sparsity)
    allocation = kept_allocation(runner)
    if allocation is None:
        passes = 2 * len(runner.blocks)
        with (
            job.timed("allocate"),
            progress(passes, "measuring errors", "block", job.dist.is_main) as bar,
        ):
            windows, ratio = job.texts.windows, args.sparsity_ratio
            allocation = by_error(runner, windows, ratio, seed=args.seed, on_progress=bar)
        keep_allocation(runner, allocation)
    shares = {name: round(each.ratio, 6) for name, each in allocation.sparsity.items()}
    job.print(f"sparsity of the linears: {min(shares.values())} to {max(shares.values())}")
    job.results["allocation"] = shares
    return allocation


def recover(job: Job, runner: BlockRunner, teacher: BlockRunner, pruned: Reached) -> Any:
    """Train the kept weights, check that every zero is still zero, and return their grids."""
    args, schedule, text = job.args, job.schedule, job.texts.training
    before = measure(runner)
    untouched = not (job.method or args.teacher)
    tests = {  # the windows on which evaluation compares with the dense model
        test.name: test.windows[compared_windows(len(test.windows))]
        for test in ([] if untouched else job.texts.tests)
    }
    shown = progress(1 + len(tests), "measuring before", "text", job.dist.is_main)
    with job.timed("measure before"), shown as bar:
        held_out = perplexity(teacher, text.held_out)
        bar(1)
        figures = perplexities(runner, list(tests.values()))
        bar(len(tests))
    packed, form = {}, FORMATS[4]
    if args.quantize:
        packed, form = q4_0_weights(runner)[0], Q4_0()
    elif args.replace_sparse_layers and args.pack_bits < 16:
        packed = packed_weights(runner)
    recoverer = Recoverer(
        runner,
        teacher,
        schedule,
        text,
        whole=bool(job.layout or job.smaller or untouched or args.quantize),
        packed=packed,
        form=form,
    )
    tokens = schedule.steps * schedule.windows * schedule.seqlen
    job.print(*recoverer.summary())
    with job.timed("recover"), progress(tokens, "recovering", "token", job.dist.is_main) as bar:
        recoverer.run(bar)
    after = measure(runner, pruned.sparsity, pruned.left_dense)
    if lost := [name for name, zeros in before.zeros.items() if after.zeros[name] < zeros]:
        raise UserError(f"--recover: {lost[0]} has lost zeros in training; report this")
    job.print(recoverer.line())
    job.results["sparsity"] = after.shares()
    job.results["recovery"] = recoverer.record() | {
        "teacher": args.teacher or args.model,
        "text": text.facts,
        "held_out": {"dense": held_out},
        "before": dict(zip(tests, (each["perplexity"] for each in figures), strict=True)),
    }
    return recoverer.scales


def quantise(job: Job, runner: BlockRunner, pruned: Reached) -> None:
    """Round linears on calibration text."""
    is_main, blocks = job.dist.is_main, len(runner.blocks)
    quantiser = (LlamaCppQuantiser if job.args.quantize else Quantiser)(runner)
    with job.timed("quantise"), progress(blocks, "quantising", "block", is_main) as bar:
        quantiser.run(job.texts.windows, bar)
    if is_main:
        print(*quantiser.summary(), sep="\n", flush=True)
        job.results["notes"] = job.results.get("notes", []) + quantiser.summary()[1:]
        measured = measure(runner, pruned.sparsity, pruned.left_dense)
        job.results["sparsity"] = measured.shares()


def first_logits(job: Job, runner: BlockRunner) -> Tensor:
    """Return logits on the beginning of the first test window."""
    window = job.texts.tests[0].windows[:1, :COMPARED_POSITIONS]
    return some_logits(runner.model, window.to(job.device))


def check_quantized(job: Job, runner: BlockRunner, before: Tensor) -> None:
    """Check and record that conversion to q4_0 will change no linear; `before`: `first_logits`."""
    record = check_q4_0(runner)
    record["difference"] = relative_difference(before, first_logits(job, runner))
    job.results["quantized"] = record
    job.print(
        f"q4_0: conversion by llama.cpp will change no value of {record['tensors']} tensors; "
        f"logits have changed by {record['difference']:.2%}"
    )
    if left := record["left"]:
        job.print(f"left at 16 bits, rows are no multiple of 32: {first_of(left)}")


def pack(job: Job, runner: BlockRunner, grids: Any, unrounded: Any) -> None:
    """Pack every sparse linear; raises UserError if the outputs on a window are not the same."""
    window = job.texts.tests[0].windows[:1].to(job.device)
    with job.timed("pack"):
        record = pack_(runner, FORMATS[job.args.pack_bits], window, grids, unrounded)
    job.results |= record


def evaluate(job: Job, runner: BlockRunner, reference: DenseReference | None) -> None:
    """Measure perplexity and the divergence from the dense model on every test set, in one pass."""
    tests, dist = job.texts.tests, job.dist
    windows = sum(len(range(len(test.windows))[dist.share(len(test.windows))]) for test in tests)
    with job.timed("eval"), progress(windows, "perplexity", "window", dist.is_main) as bar:
        figures = perplexities(runner, [test.windows for test in tests], bar, reference)
    records = [evaluation_record(test, each) for test, each in zip(tests, figures, strict=True)]
    job.results["evaluation"] = records
    job.results["perplexity"] = {each["name"]: each["perplexity"] for each in records}
    if "sparsity" not in job.results:
        job.results["sparsity"] = measure(runner).shares()


def record(job: Job, runner: BlockRunner) -> None:
    """Write results.json, log_METHOD.txt, the picture of a recovery and the saved model's card."""
    folder = Path(job.args.save)
    folder.mkdir(parents=True, exist_ok=True)
    keep_other_results(folder, job.fingerprint)
    finish_results(job, runner)
    write_results(folder, job.results)
    write_log(folder, job.results)
    if job.args.save_model:
        write_card(job, job.args.save_model)
        (folder / UNMEASURED).unlink(missing_ok=True)
    if "recovery" in job.results:
        if plots.can_draw():
            plots.save(plots.recovery_curve(job.results), folder / "recovery.png")


def run_tasks(job: Job, runner: BlockRunner) -> None:
    """Run tasks of lm-eval on the model and, if it was changed, on the dense one; print figures."""
    args, results = job.args, job.results
    options = dict(batch_size=job.batch_size, include_path=args.include_path)
    with job.timed("tasks"):
        results["tasks"] = tasks.run_tasks(runner.model, job.tokenizer, args.tasks, **options)
        if job.changes and not args.teacher:
            original = job.vocabulary.original_tokenizer if job.vocabulary else job.tokenizer
            runner.model.to("meta")  # its memory is the dense model's now
            with ExitStack() as cleanup:
                job.store = None
                dense = load(job, cleanup).model
                results["dense_tasks"] = tasks.run_tasks(dense, original, args.tasks, **options)
    write_results(Path(args.save), results)
    print(*tasks.task_lines(results["tasks"], results.get("dense_tasks")), sep="\n", flush=True)
