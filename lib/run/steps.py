"""The steps of a run, in the order in which main.run takes them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lib.data.processor import copy_processor
from lib.data.tokenizer import as_loaded
from lib.data.tokenizer_model import write_tokenizer_model
from lib.eval import COMPARED_POSITIONS, perplexities, perplexity, some_logits
from lib.methods.registry import method_of
from lib.methods.sparsity import NEURONS
from lib.model.access import local_only
from lib.model.blocks import BlockRunner
from lib.model.pretrained import (
    footprint,
    parameter_bytes,
    save_in_shards,
    save_model,
    text_alone,
)
from lib.model.reference import (
    DenseReference,
    compared_windows,
    dense_states,
    local_windows,
    shared_states,
    tail_of,
)
from lib.model.rows import keep_rows_
from lib.packed.checkpoint import mark_packed_
from lib.packed.formats import FORMATS, Grid
from lib.prune import Reached
from lib.prune import prune as prune_blocks
from lib.pruning.allocation import Allocation, keep_allocation, kept_allocation, uniform
from lib.pruning.by_error import by_error
from lib.pruning.check import measure
from lib.pruning.experts import ExpertPruner
from lib.pruning.neurons import NeuronPruner
from lib.pruning.pruner import Pruner, first_of
from lib.pruning.quantize import Quantizer
from lib.pruning.quantize import check_quantized as check_quantized_weights
from lib.recover import Recoverer
from lib.run import plots, tasks
from lib.run.card import model_card
from lib.run.job import Job
from lib.run.load import load
from lib.run.record import evaluation_record, finish_results, keep_other_results, write_log
from lib.run.results import write_results
from lib.run.teacher import load_teacher
from lib.run.texts import resolve_bos
from lib.sparse import check_same_outputs, pack_, relative_difference
from lib.util.errors import UserError, first_line
from lib.util.files import partial_of, put_in_place, sync_all
from lib.util.host import gib
from lib.util.progress import progress
from lib.vocabulary import PROOF_TOKENS

__all__ = ["load", "load_teacher", "resolve_bos"]  # steps of main.run too
Starts = dict[int, tuple[Tensor, Grid]]  # of `Quantizer`


def close_store(job: Job) -> None:
    """Remove the folder of finished blocks, or say how to go on where the run ended early."""
    if not job.folder:
        return
    if "saved_bytes" in job.results or ("seconds" in job.results and not job.args.save_model):
        job.folder.clear()
        return
    job.folder.close()
    if job.folder.files():
        how = "the same command continues"
        if not job.args.resume:
            how = f"add --resume {job.folder.path} to continue"
        print(f"kept what is finished: {how}", flush=True)


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
    plan, args, sparsity = job.plan, job.args, None
    if not plan.method:
        return Reached(measure(runner))
    method = method_of(plan.method, plan.variant)
    size = parameter_bytes(runner.model, runner.save_dtype)
    if plan.removes:
        kind = NeuronPruner if plan.removes == NEURONS else ExpertPruner
        pruner = kind(runner, method, job.layout, job.left, args.seed)
    else:
        allocation = allocate(job, runner)
        pruner = Pruner(runner, method, allocation)
        if not plan.variant:  # which only comes near the ratio
            sparsity = allocation.sparsity
    shown = progress(len(runner.blocks), "pruning", "block", job.dist.is_main)
    with job.timed("prune"), shown as bar:
        pruned, reached = prune_blocks(pruner, job.texts.windows, sparsity, bar)
    job.print(*pruned.summary())
    job.results |= {"notes": pruned.summary()[1:], "sparsity": reached.measured.shares()}
    if plan.removes:
        job.results[plan.removes] = pruned.record() | {
            "bytes_before": size,
            "bytes_after": parameter_bytes(runner.model, runner.save_dtype),
        }
    return reached


def allocate(job: Job, runner: BlockRunner) -> Allocation:
    """Return the sparsity of every linear."""
    args = job.args
    if args.allocation == "uniform":
        return uniform(runner, job.plan.sparsity)
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


def quantize(job: Job, runner: BlockRunner, reached: Reached) -> Starts:
    """Round linears on calibration text; return from where they are trained, if they are."""
    plan, blocks = job.plan, len(runner.blocks)
    masters = None
    if plan.tokens:  # updates of a low rank leave no memory for float32 masters
        masters = runner.save_dtype if job.schedule.rank else torch.float32
    quantizer = Quantizer(runner, FORMATS[plan.format], masters)
    shown = progress(blocks, "rounding", "block", job.dist.is_main)
    with job.timed("quantize"), shown as bar:
        quantizer.run(job.texts.windows, bar)
    job.print(*quantizer.summary())
    job.results["notes"] = job.results.get("notes", []) + quantizer.summary()[1:]
    job.results["sparsity"] = reached.measure(runner).shares()
    return quantizer.starts


def recover(
    job: Job, runner: BlockRunner, teacher: BlockRunner, reached: Reached, starts: Starts
) -> dict[str, Tensor]:
    """Train the kept weights, check that every zero is still zero, and return their scales."""
    plan, schedule, text = job.plan, job.schedule, job.texts.training
    tests = {  # the windows on which evaluation compares with the dense model
        test.name: test.windows[compared_windows(len(test.windows))]
        for test in (job.texts.tests if plan.method or plan.teacher or starts else [])
    }
    shown = progress(1 + len(tests), "measuring before", "text", job.dist.is_main)
    with job.timed("measure before"), shown as bar:
        held_out = perplexity(teacher, text.held_out)
        bar(1)
        figures = perplexities(runner, list(tests.values()))
        bar(len(tests))
    whole = plan.trains_all or job.smaller
    recoverer = Recoverer(runner, teacher, schedule, text, whole=whole, starts=starts)
    tokens = schedule.steps * schedule.windows * schedule.seqlen
    job.print(*recoverer.summary())
    with job.timed("recover"), progress(tokens, "recovering", "token", job.dist.is_main) as bar:
        recoverer.run(bar)
    job.print(recoverer.line())
    job.results["sparsity"] = reached.measure(runner).shares()
    job.results["recovery"] = recoverer.record() | {
        "teacher": job.args.teacher or job.args.model,
        "text": text.facts,
        "held_out": {"dense": held_out},
        "before": dict(zip(tests, (each["perplexity"] for each in figures), strict=True)),
    }
    return recoverer.scales


def first_logits(job: Job, runner: BlockRunner) -> Tensor:
    """Return logits on the beginning of the first test window."""
    window = job.texts.tests[0].windows[:1, :COMPARED_POSITIONS]
    return some_logits(runner.model, window.to(job.device))


def check_quantized(job: Job, runner: BlockRunner, before: Tensor) -> None:
    """Check and record that conversion will change no linear; `before`: `first_logits`."""
    record = check_quantized_weights(runner, FORMATS[job.plan.format])
    record["difference"] = relative_difference(before, first_logits(job, runner))
    job.results["quantized"] = record
    job.print(
        f"{record['format']}: conversion by llama.cpp will change no value of {record['tensors']} "
        f"tensors; logits have changed by {record['difference']:.2%}"
    )
    if left := record["left"]:
        job.print(f"left at 16 bits, rows are no multiple of 32: {first_of(left)}")


def pack(
    job: Job,
    runner: BlockRunner,
    scales: dict[str, Tensor] | None,
    unrounded: Tensor | None,
) -> None:
    """Pack every sparse linear; raises UserError if the outputs on a window are not the same."""
    window = job.texts.tests[0].windows[:1].to(job.device)
    with job.timed("pack"):
        record = pack_(runner, FORMATS[job.plan.format], window, scales, unrounded)
    job.results |= record


def save(job: Job, runner: BlockRunner, cleanup: ExitStack) -> None:
    """Save model and tokenizer as a new folder; where blocks are in files, these are its shards."""
    weights, moved, model = runner.weights, {}, runner.model
    weights.wait_for_readers()
    stage, target = partial_of(job.args.save_model), Path(job.args.save_model)
    if job.dist.is_main:
        holds_blocks = bool(job.folder) and job.folder.path.resolve() == stage.resolve()
        stage.mkdir(parents=True, exist_ok=True)
        for file in stage.glob("model*.safetensors*"):
            file.unlink()  # of a run that was killed while it saved
        if job.args.text_only:
            model = _text_alone(job, model)
        with job.timed("save"), ExitStack() as failed:
            if not holds_blocks:
                failed.callback(shutil.rmtree, stage, ignore_errors=True)
            try:
                shards = weights.shards() if model is runner.model else None
                names = shards and save_in_shards(model, stage, runner.save_dtype, shards)
                if not names:
                    with weights.mapped():
                        save_model(model, stage, runner.save_dtype)
            except SafetensorError as error:
                raise UserError(f"--save_model {target}: can't be saved ({error})") from error
            as_loaded(job.tokenizer).save_pretrained(stage)
            write_tokenizer_model(job.tokenizer, stage)
            if model is runner.model:
                rows = job.vocabulary.rows.tolist() if job.vocabulary else ()
                copy_processor(job.checkpoint, stage, {old: new for new, old in enumerate(rows)})
            sync_all(stage)
            failed.pop_all()
            moved = {old: str(target / name) for old, name in (names or {}).items()}
            if job.folder and (weights.resident or holds_blocks):
                if not (weights.resident or names):  # what is still read stays until the end
                    other = cleanup.enter_context(TemporaryDirectory(dir=target.parent))
                    for file in job.folder.files():
                        moved[str(file)] = shutil.move(file, other)
                job.folder.clear()
                job.folder = None
            try:
                put_in_place(stage, target)
            except OSError as error:
                raise UserError(
                    f"--save_model {target}: {first_line(error)}; the whole model is in {stage}"
                ) from error
            for file in names or ():  # it has another name now
                Path(file).unlink(missing_ok=True)
        weight_files = target.glob("*.safetensors")
        job.results["saved_bytes"] = sum(file.stat().st_size for file in weight_files)
        print(f"saved: {target}", flush=True)
    weights.moved(job.dist.all_gather_object(moved)[0])


def _text_alone(job: Job, model: nn.Module) -> nn.Module:
    """Return the text model alone, say what goes, and check that it computes the same."""
    alone = text_alone(model, job.checkpoint)
    if job.plan.packs:
        mark_packed_(alone)
    window = job.texts.tests[0].windows[:1, :COMPARED_POSITIONS].to(job.device)
    before, after = some_logits(model, window), some_logits(alone, window)
    check_same_outputs(before, after, "--text_only: whole and text alone", least=1e-5)
    gone = {name: each for name, each in model.state_dict().items() if name in model.unread}
    parts = sorted({".".join(name.split(".")[:2]) for name in gone})
    size = gib(sum(each.nbytes for each in gone.values()))
    line = f"text only: {', '.join(parts)} are left out, {len(gone)} tensors, {size}"
    job.results |= {"notes": [*job.results.get("notes", []), line], "loaded_by": None}
    job.print(line)
    return alone


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
        sources = [source.text for source in job.sources if job.plan.reads_train]
        sources += [each.text for each in job.vocabulary_sources if each.text not in sources]
        card = model_card(job.results, sources, online=not local_only(job.checkpoint))
        (Path(job.args.save_model) / "README.md").write_text(card, "utf-8")
    if "recovery" in job.results:
        if plots.can_draw():
            plots.save(plots.recovery_curve(job.results), folder / "recovery.png")


def run_tasks(job: Job, runner: BlockRunner) -> None:
    """Run tasks of lm-eval on the model and, if it was changed, on the dense one; print figures."""
    args, results = job.args, job.results
    options = dict(batch_size=job.batch_size, include_path=args.include_path)
    with job.timed("tasks"):
        results["tasks"] = tasks.run_tasks(runner.model, job.tokenizer, args.tasks, **options)
        if job.plan.changes and not args.teacher:
            original = job.vocabulary.original_tokenizer if job.vocabulary else job.tokenizer
            runner.model.to("meta")  # its memory is the dense model's now
            with ExitStack() as cleanup:
                dense = load(job, cleanup, None).model
                results["dense_tasks"] = tasks.run_tasks(dense, original, args.tasks, **options)
    write_results(Path(args.save), results)
    print(*tasks.task_lines(results["tasks"], results.get("dense_tasks")), sep="\n", flush=True)
