"""Prune a causal language model for one language: check, load, prune, recover, evaluate, save.

    python main.py --model MODEL --prune_method wanda --calibration_data DIR --save_model OUT

`run` is the whole of it, step by step. Everything that can fail cheaply fails in `check`, before a
weight is read, and heavy imports come after the flags have been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.check import check
from lib.run.flag_checks import check_flags
from lib.run.flags import build_parser
from lib.run.job import Job, LoadedModel
from lib.run.load import load
from lib.run.products import choose_products
from lib.run.steps import Steps
from lib.run.teacher import load_teacher
from lib.run.texts import resolve_bos
from lib.util import command
from lib.util.events import emit
from lib.util.folders import Target, locked_dir, locked_results
from lib.util.products import exact_products

Measured = Results = dict[str, Any]

if TYPE_CHECKING:
    from torch import Tensor

    from lib.model.blocks import BlockRunner
    from lib.pruning.allocation import Allocation
    from lib.quality.reference import DenseReference, States
    from lib.run.completions import Completions
    from lib.run.quality import Quality


def main(argv: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    run(check(args))


def run(job: Job) -> Results:
    """Run the job and return the results.json record on the main process, {} on the others.

    Raises UserError at the end if a step after pruning failed; the other steps are still run.
    """
    from lib.run.completions import Completions
    from lib.run.depth import Depth
    from lib.run.quality import Quality

    args, target = job.args, None
    with command.unfailing_output(), ExitStack() as at_end:
        if job.dist.is_main:
            at_end.enter_context(locked_results(args.save))
        if args.save_model and job.dist.is_main:
            target = at_end.enter_context(locked_dir(args.save_model, "--save_model"))
        loaded = load(job, at_end)
        if job.vocabulary:
            trim(job, loaded)
        resolve_bos(job, loaded)
        choose_products(job, loaded, at_end)
        teacher = load_teacher(job, loaded) if job.schedule or args.teacher else None
        completions, quality = Completions(job, loaded), Quality(job, loaded)
        if job.has_dense:
            dense = teacher if args.teacher else loaded.runner
            completions.generate("dense", dense.model)
            loaded.reference = dense_reference(job, loaded, dense)
            quality.measure("dense", dense)
            if args.depth:
                depth = Depth(job, loaded, dense)
                loaded.after_block = depth.after_block
            del dense  # with a teacher, the memory of a whole model
        figures = prune(job, loaded) if job.method_spec else {}
        if args.depth:
            figures["depth"] = depth.records()
        if job.schedule:
            figures |= recover(job, loaded, teacher)
        del teacher
        if job.rounding:
            figures |= round_weights(job, loaded, figures.get("notes", []))
        return finish(
            job,
            loaded,
            completions=completions,
            quality=quality,
            figures=figures,
            target=target,
        )


def finish(
    job: Job,
    loaded: LoadedModel,
    completions: Completions,
    quality: Quality,
    figures: Measured,
    target: Target | None,
) -> Results:
    """Evaluate, save and record; a step that fails does not stop the steps after it."""
    from lib.run.card import model_card
    from lib.run.record import print_summary

    args, steps, results, card = job.args, Steps(), {}, None
    with steps.attempt("evaluation"):
        if args.replace_sparse_layers:
            figures |= pack(job, loaded)
        if args.pack_embeddings:
            figures |= pack_embeddings(job, loaded)
        figures |= evaluate(job, loaded)
        completions.generate("model", loaded.model)
        with steps.attempt("--abilities and --fidelity"):
            quality.measure("model", loaded.runner)
        job.dist.close()
        if job.dist.is_main:
            figures |= {"completions": completions.records()} | quality.records()
            results = collect(job, loaded, figures)
    if not job.dist.is_main:
        steps.raise_failures()
        return {}
    if results and target:
        with steps.attempt("card"):
            emit("card")
            card = model_card(results, read_sources(job))
    if target:
        with steps.attempt("--save_model"):
            size = save(job, loaded, card=card, target=target, steps=steps)
            results |= {"saved_bytes": size} if results else {}
    if results:
        with steps.attempt(f"--save {args.save}"):
            record(job, results)
    if results and args.tasks:
        with steps.attempt(f"--tasks {','.join(args.tasks)}"):
            results["tasks"] = do_tasks(job, loaded)
            record(job, results)
    if "recovery" in results:
        with steps.attempt("recovery.png"):
            draw(job, results)
    if results:
        with steps.attempt("summary"):
            emit("summary")
            print_summary(results)
    saved = "save" in job.seconds
    if job.finished and (saved or not (target or steps.failures)):
        job.finished.clear()
    steps.raise_failures(f"the model is saved in {args.save_model}" if saved else None)
    return results


def trim(job: Job, loaded: LoadedModel) -> None:
    """Remove the rows of dropped tokens, and check that the others keep their logits."""
    from lib.eval import some_logits
    from lib.model.pretrained import footprint
    from lib.util.host import gib
    from lib.vocabulary import PROOF_TOKENS, check_same_logits

    model, vocabulary = loaded.model, job.vocabulary
    window = job.texts.tests[0].windows[:1, :PROOF_TOKENS].to(job.device)
    with job.timed("trim"):
        size = footprint(model)
        before = some_logits(model, vocabulary.original_ids(window))
        vocabulary.keep_rows_(model)
        difference = check_same_logits(vocabulary.select_logits(before), some_logits(model, window))
    saved = size - footprint(model)
    vocabulary.facts |= {"bytes_dropped": saved, "logits_differ": difference}
    if job.dist.is_main:
        print(
            f"trimmed: {gib(size)} before, {gib(size - saved)} now; "
            f"logits differ by {difference:.1g}"
        )


def dense_reference(job: Job, loaded: LoadedModel, dense: BlockRunner) -> DenseReference:
    """Return the dense model's hidden states on the test windows, which evaluation uses."""
    from lib.quality.reference import DenseReference, dense_states, own_windows, tail_of
    from lib.util.progress import progress

    dist, sets = job.dist, [test.windows for test in job.texts.tests]

    def run() -> States:
        windows = sum(len(own_windows(len(windows), dist)) for windows in sets)
        with job.timed("dense"), progress(windows, "dense", "window", dist.is_main) as bar:
            return dense_states(
                dense,
                sets,
                job.batch_size,
                dist=dist,
                on_progress=bar,
                state_device=loaded.state_device,
            )

    key = (*job.dense_key, "states", [test.facts["digest"] for test in job.texts.tests])
    return DenseReference(tail_of(dense), job.cache.dense_outputs(key, run))


def prune(job: Job, loaded: LoadedModel) -> Measured:
    """Prune every linear of the decoder blocks, and check that the sparsity was reached."""
    from lib.model.pretrained import saved_dtype
    from lib.prune import Pruner
    from lib.pruning.check import measure
    from lib.util.progress import progress

    args, dist, runner = job.args, job.dist, loaded.runner
    if job.mlps:
        return prune_neurons(job, loaded)
    allocation, allocation_record = allocate(job, loaded)
    pruner = Pruner(
        runner=runner,
        method_spec=job.method_spec,
        allocation=allocation,
        dist=dist,
        rounding=saved_dtype(args.dtype, job.config),
    )
    blocks = len(loaded.blocks)
    with job.timed("prune"), progress(blocks, "pruning", "block", dist.is_main) as bar:
        pruned = pruner.run(
            job.texts.windows,
            job.batch_size,
            state_device=loaded.state_device,
            on_progress=after_block(loaded, bar),
            cache_inputs=loaded.cache_inputs,
        )
    if not dist.is_main:
        return {}
    print(*pruned.summary(), sep="\n")
    # the variant only comes near the ratio
    loaded.sparsity = None if args.use_variant else allocation.sparsity
    loaded.left_dense = frozenset(pruned.left_dense)
    figures: Measured = {"notes": pruned.summary()[1:]}
    if allocation_record:
        figures["allocation"] = allocation_record
    measured = measure(runner, loaded.sparsity, loaded.left_dense)
    return figures | {"sparsity": measured.shares()}


def prune_neurons(job: Job, loaded: LoadedModel) -> Measured:
    """Remove whole neurons of the MLPs, which makes the model smaller."""
    from lib.model.pretrained import parameter_bytes, saved_dtype
    from lib.pruning.check import measure
    from lib.pruning.neurons import NeuronPruner
    from lib.run.record import neurons_record
    from lib.util.progress import progress

    dist, runner, dtype = job.dist, loaded.runner, saved_dtype(job.args.dtype, job.config)
    size = parameter_bytes(loaded.model, dtype)
    pruner = NeuronPruner(
        runner=runner,
        method_spec=job.method_spec,
        layout=job.mlps,
        left=job.neurons_left,
        dist=dist,
        rounding=dtype,
    )
    blocks = len(loaded.blocks)
    with job.timed("prune"), progress(blocks, "pruning", "block", dist.is_main) as bar:
        pruned = pruner.run(
            job.texts.windows, job.batch_size, loaded.state_device, after_block(loaded, bar)
        )
    if not dist.is_main:
        return {}
    print(*pruned.summary(), sep="\n")
    sizes = size, parameter_bytes(loaded.model, dtype)
    record = neurons_record(
        pruned, field=job.mlps.field, multiple=job.args.neurons_multiple, sizes=sizes
    )
    return {"notes": pruned.warnings, "neurons": record, "sparsity": measure(runner).shares()}


def after_block(loaded: LoadedModel, bar: Callable[[int], None]) -> Callable[[int], None]:
    """Return the function to call when a block was pruned: with --depth, it also measures."""

    def done(blocks: int) -> None:
        bar(blocks)
        if loaded.after_block:
            loaded.after_block()

    return done


def allocate(job: Job, loaded: LoadedModel) -> tuple[Allocation, Any]:
    """Return the sparsity of every linear, and its record for results.json (None if uniform)."""
    from lib.pruning.allocation import keep_allocation, kept_allocation, of_blocks, uniform
    from lib.pruning.by_error import by_error
    from lib.pruning.owl import owl
    from lib.util.progress import progress

    args, is_main, blocks = job.args, job.dist.is_main, loaded.blocks
    if args.allocation == "uniform":
        return uniform(loaded.runner, job.sparsity), None
    if args.resume and (kept := kept_allocation(job.finished, job.dist)):
        return kept
    by_outliers = args.allocation == "owl"
    passes, label = (1, "outliers") if by_outliers else (2, "errors")
    with (
        job.timed("allocate"),
        progress(passes * len(blocks), label, "block", is_main) as bar,
    ):
        common = dict(
            runner=loaded.runner,
            windows=job.texts.windows,
            batch_size=job.batch_size,
            ratio=args.sparsity_ratio,
            dist=job.dist,
            state_device=loaded.state_device,
            on_progress=bar,
        )
        if by_outliers:
            ratios = owl(**common)
            allocation = of_blocks(loaded.runner, ratios)
            allocation_record = [round(ratio, 6) for ratio in ratios]
        else:
            allocation = by_error(**common, seed=args.seed)
            sparsities = allocation.sparsity.items()
            allocation_record = {name: round(sparsity.ratio, 6) for name, sparsity in sparsities}
    if is_main:
        shares = [round(sparsity.ratio, 6) for sparsity in allocation.sparsity.values()]
        parts = "blocks" if by_outliers else "linears"
        print(f"sparsity of the {parts}: {min(shares)} to {max(shares)}")
    if job.finished:
        keep_allocation(job.finished, allocation, allocation_record)
    return allocation, allocation_record


def recover(job: Job, loaded: LoadedModel, teacher: BlockRunner) -> Measured:
    """Train the kept weights, and check that every zero is still zero."""
    from lib.eval import perplexities
    from lib.model.pretrained import saved_dtype
    from lib.pruning.check import measure
    from lib.recover import Grid, Recoverer
    from lib.run.record import recovery_record
    from lib.sparse import packed_weights
    from lib.util.progress import progress

    args, dist, schedule, text = job.args, job.dist, job.schedule, job.texts.training
    before = measure(loaded.runner)
    sets = [text.held_out, *(test.windows for test in job.texts.tests)]
    with job.timed("measure before"), progress(2, "perplexity", "model", dist.is_main) as bar:
        dense, pruned = [], []
        for runner, values in ((teacher, dense), (loaded.runner, pruned)):
            measured = perplexities(runner, sets, job.batch_size, dist)
            values += [perplexity.value for perplexity in measured]
            bar(1)

    def perplexity(runner: BlockRunner, windows: Tensor) -> float:
        return perplexities(runner, [windows], job.batch_size, dist)[0].value

    grids = {}
    if args.replace_sparse_layers and args.pack_bits < 16:
        weights = packed_weights(loaded.blocks, loaded.runner.name).items()
        grids = {name: Grid(args.pack_bits, transposed) for name, transposed in weights}
    recoverer = Recoverer(
        runner=loaded.runner,
        teacher=teacher,
        schedule=schedule,
        text=text,
        whole=bool(job.mlps or job.smaller),
        batch_size=job.batch_size,
        measure=perplexity,
        rounding=saved_dtype(args.dtype, job.config),
        dist=dist,
        finished=job.finished,
        checkpointed=loaded.checkpointed,
        grids=grids,
    )
    tokens = schedule.steps * schedule.windows * schedule.seqlen
    if dist.is_main:
        print(*recoverer.summary(), sep="\n", flush=True)
    with job.timed("recover"), progress(tokens, "recovering", "token", dist.is_main) as bar:
        recovered = recoverer.run(bar)
    loaded.scales = recoverer.scales
    after = measure(loaded.runner, loaded.sparsity, loaded.left_dense)
    assert all(after.zeros[name] >= zeros for name, zeros in before.zeros.items())
    if not dist.is_main:
        return {}
    print(recovered.line())
    record = recovery_record(job, recoverer.schedule, recovered, dense=dense, pruned=pruned)
    return {"sparsity": after.shares(), "recovery": record}


def round_weights(job: Job, loaded: LoadedModel, notes: list[str]) -> Measured:
    """Round what will be packed to integers, on calibration text; `notes` are those of pruning."""
    from lib.eval import COMPARED_POSITIONS, some_logits
    from lib.pruning.check import measure
    from lib.round import Rounder
    from lib.util.progress import progress

    dist, runner, blocks = job.dist, loaded.runner, len(loaded.blocks)
    window = job.texts.tests[0].windows[:1, :COMPARED_POSITIONS].to(job.device)
    with exact_products():
        loaded.unrounded = some_logits(loaded.model, window)
    rounder = Rounder(runner, job.rounding, dist=dist)
    with job.timed("round"), progress(blocks, "rounding", "block", dist.is_main) as bar:
        rounder.run(
            job.texts.windows,
            job.batch_size,
            state_device=loaded.state_device,
            on_progress=bar,
            cache_inputs=loaded.cache_inputs,
        )
    loaded.scales = rounder.scales
    if not dist.is_main:
        return {}
    print(*rounder.summary(), sep="\n")
    measured = measure(runner, loaded.sparsity, loaded.left_dense)
    return {"sparsity": measured.shares(), "notes": notes + rounder.summary()[1:]}


@exact_products()
def pack(job: Job, loaded: LoadedModel) -> Measured:
    """Pack every sparse linear, and check on one window that the outputs are the same."""
    from lib.eval import some_logits
    from lib.model.pretrained import footprint, saved_dtype
    from lib.run.record import packed_line, packing_record
    from lib.sparse import check_same_outputs, decoding, packed_size, swap_linears_, unpacking
    from lib.util.host import gib

    args, model = job.args, loaded.model
    window = job.texts.tests[0].windows[:1].to(job.device)

    def logits() -> list[Tensor]:
        """Return the logits of the whole window, and of its start computed as in decoding."""
        whole = some_logits(model, window)
        with decoding(model):
            return [whole, some_logits(model, window[:, : whole.shape[1]])]

    emit("pack")
    before, size = logits(), footprint(model)
    on_device = partial(loaded.runner.on_device, write_back=True)
    report = swap_linears_(
        model=model,
        blocks=loaded.blocks,
        device=job.device,
        on_device=on_device,
        bits=args.pack_bits,
        scales=loaded.scales,
    )
    job.dist.barrier()  # all are packed
    after, reference = logits(), before
    if report.bits < 16:  # rounded to integers it is another model, whose dense outputs count
        with unpacking(model):
            reference = logits()
    for dense, packed in zip(reference, after, strict=True):
        check_same_outputs(dense, packed)
    saved = packed_size(model, saved_dtype(args.dtype, job.config))
    unrounded = before[-1] if loaded.unrounded is None else loaded.unrounded
    record = packing_record(saved, len(report.dense), before=unrounded, after=after[-1])
    if job.dist.is_main:
        print(report, packed_line(record), sep="\n")
        print(f"footprint: {gib(size)} dense, {gib(footprint(model))} packed")
    return {"packed": record}


@exact_products()
def pack_embeddings(job: Job, loaded: LoadedModel) -> Measured:
    """Round embedding and head to integers, and measure on one window what that changes."""
    from lib.eval import some_logits
    from lib.model.pretrained import saved_dtype
    from lib.run.record import packed_embeddings_line, packed_embeddings_record
    from lib.sparse import check_same_outputs, decoding, pack_embeddings_, unpacking

    model = loaded.model
    window = job.texts.tests[0].windows[:1].to(job.device)
    before = some_logits(model, window)
    modules = pack_embeddings_(model)
    with decoding(model):
        after = some_logits(model, window)
    with unpacking(model):
        check_same_outputs(some_logits(model, window), after)
    dtype = saved_dtype(job.args.dtype, job.config)
    record = packed_embeddings_record(model, modules, dtype, before=before, after=after)
    if job.dist.is_main:
        print(packed_embeddings_line(record))
    return {"packed_embeddings": record}


def evaluate(job: Job, loaded: LoadedModel) -> Measured:
    """Measure perplexity and the divergence from the dense model on every test set, in one pass."""
    from lib.eval import perplexities
    from lib.run.record import evaluation_record
    from lib.util.progress import progress

    tests, is_main = job.texts.tests, job.dist.is_main
    sets = [test.windows for test in tests]
    windows = sum(map(len, sets))
    with job.timed("eval"), progress(windows, "perplexity", "window", is_main) as bar:
        measured = perplexities(
            loaded.runner,
            sets,
            job.batch_size,
            job.dist,
            on_progress=bar,
            state_device=loaded.state_device,
            reference=loaded.reference,
        )
    records = [
        evaluation_record(test, values) for test, values in zip(tests, measured, strict=True)
    ]
    return {"evaluation": records}


def collect(job: Job, loaded: LoadedModel, figures: Measured) -> Results:
    """Return the results.json record; measure the share of zeros if nothing was pruned."""
    from lib.pruning.check import measure
    from lib.run.record import results_of

    if "sparsity" not in figures:
        figures["sparsity"] = measure(loaded.runner).shares()
    return results_of(job, loaded, figures)


def do_tasks(job: Job, loaded: LoadedModel) -> dict[str, Any]:
    """Run tasks of lm-eval, on the main process alone, since the others have ended."""
    from lib.quality.tasks import run_tasks

    args = job.args
    with job.timed("tasks"):
        return run_tasks(
            loaded.model,
            job.tokenizer,
            args.tasks,
            batch_size=job.batch_size,
            include_path=args.include_path,
        )


def save(job: Job, loaded: LoadedModel, card: str | None, target: Target, steps: Steps) -> int:
    """Save model, tokenizer and card as one folder, replaced as a whole; return its bytes."""
    from lib.data.tokenizer_model import write_tokenizer_model
    from lib.model.pretrained import save_model, saved_dtype

    args = job.args
    with job.timed("save"), target.staged() as stage:
        with loaded.runner.mapped():
            save_model(loaded.model, stage, saved_dtype(args.dtype, job.config))
        job.tokenizer.save_pretrained(stage)
        with steps.attempt("tokenizer.model"):
            emit("tokenizer.model")
            write_tokenizer_model(job.tokenizer, stage)
        if card:
            (stage / "README.md").write_text(card, "utf-8")
        size = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
    print(f"saved: {args.save_model}", flush=True)
    return size


def record(job: Job, results: Results) -> None:
    """Write results.json and log_METHOD.txt in place of those of an earlier run."""
    from lib.run.record import write_log
    from lib.run.results import write_results

    folder = Path(job.args.save)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, results)
    log = write_log(folder, results)
    for file in {*folder.glob("log_*.txt"), folder / "recovery.png"} - {log}:
        file.unlink(missing_ok=True)  # of the run whose results.json was replaced


def draw(job: Job, results: Results) -> None:
    """Draw the curve of the recovery, if matplotlib is installed."""
    from lib.commands import plots

    emit("recovery.png")
    if plots.can_draw():
        plots.save(plots.recovery_curve(results), Path(job.args.save) / "recovery.png")


def read_sources(job: Job) -> list[str]:
    """Return the names of the texts that the model was calibrated, trained or trimmed on."""
    names = [source.text for source in job.sources if job.calibrated or job.schedule]
    return names + [source.text for source in job.vocabulary_sources if source.text not in names]


if __name__ == "__main__":
    sys.exit(command.run(main))
