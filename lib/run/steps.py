"""The steps of a run, in the order of main.run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..eval import COMPARED_POSITIONS, perplexities, perplexity, some_logits
from ..model.blocks import BlockRunner
from ..model.pretrained import footprint, parameter_bytes
from ..model.reference import (
    DenseReference,
    dense_states,
    local_windows,
    shared_states,
    tail_of,
)
from ..model.rows import keep_rows_
from ..packed.formats import FORMATS, Grid
from ..prune import Pruner
from ..pruning.allocation import Allocation, kept_allocation
from ..pruning.allocation import allocate as choose_allocation
from ..pruning.check import SparsityCheck
from ..pruning.masks import packed_masks, write_masks
from ..quantize import check_quantized as check_quantized_weights
from ..quantize import quantize as quantize_linears
from ..recover import Recoverer
from ..remove import remove
from ..sparse import check_same_outputs, pack_, relative_difference
from ..util.errors import UserError
from ..util.files import write_text
from ..util.host import gib
from ..vocabulary import PROOF_TOKENS
from . import tasks
from .completions import Completions
from .job import Job
from .load import load, load_teacher
from .record import (
    base_results,
    evaluation_record,
    finish_results,
    keep_other_results,
    print_summary,
    write_log,
)
from .results import write_losses, write_results
from .save import close_store, save, write_card
from .texts import resolve_bos

__all__ = [  # steps of main.run in other modules
    "Completions",
    "base_results",
    "close_store",
    "load",
    "load_teacher",
    "print_summary",
    "resolve_bos",
    "save",
]
ALLOCATION = "allocation.json"  # in --save; an input of --allocation
MOST_ZEROS = 0.25  # share that quantization of the original to 4 bits may have made
BEFORE = "perplexity", "bits_per_byte", "kl", "top1_agreement"


def trim(job: Job, runner: BlockRunner) -> None:
    """Remove the rows of tokens, and check that the other tokens keep their logits."""
    model, vocabulary = runner.model, job.vocabulary
    window = job.texts.tests[0].ids[:1, :PROOF_TOKENS].to(job.device)
    held_out = vocabulary.held_out[:2] if vocabulary.held_out else ()
    total = sum(map(len, held_out))
    with job.timed("trim", "measuring trimming" if total else "", total, "window") as bar:
        size = footprint(model)
        nats = [perplexities(runner, [each], bar)[0]["nats"] for each in held_out[:1]]
        rows = vocabulary.rows.to(job.device)
        before = some_logits(model, rows[window]).index_select(-1, rows)
        keep_rows_(model, vocabulary.rows)
        after, flag = some_logits(model, window), "--trim_vocabulary"
        difference = check_same_outputs(before, after, flag, "whole and trimmed", least=1e-5)
        nats += [perplexities(runner, [each], bar)[0]["nats"] for each in held_out[1:]]
    saved = size - footprint(model)
    job.outcome.results["trimmed_bytes"] = parameter_bytes(model, runner.save_dtype)
    vocabulary.record |= {"bytes_dropped": saved, "logits_differ": difference}
    job.print(
        f"trimmed: {gib(size)} -> {gib(size - saved)}; logits differ by {difference:.1g}",
        *(vocabulary.record_cost(*nats) if nats else ()),
    )


def dense_reference(job: Job, dense: BlockRunner) -> DenseReference:
    """Return the dense model's hidden states on the test windows, the reference of the evaluation.

    The runs of a sweep compute them once.
    """
    dist, sets = job.dist, [test.windows for test in job.texts.tests]
    windows = sum(len(local_windows(len(each), dist)) for each in sets)

    def compute():
        with job.timed("dense", "dense", windows, "window") as bar:
            return dense_states(dense, sets, bar)

    shares = job.shared and dist.size == 1
    states = shared_states(job.shared, job.dense_key, compute) if shares else compute()
    return DenseReference(tail_of(dense), states)


def prune(job: Job, runner: BlockRunner) -> SparsityCheck:
    """Prune linear layers, or remove neurons or experts; return and check the sparsity."""
    plan, args, target = job.plan, job.args, None
    if not plan.method:
        return SparsityCheck(runner)
    method, windows = plan.method_class, job.texts.windows
    size = parameter_bytes(runner.model, runner.save_dtype)
    allocation = None if plan.removes else allocate(job, runner)
    with job.timed("prune", "pruning", len(runner.blocks)) as bar:
        if plan.removes:
            pruner = remove(runner, windows, method, job.layout, job.left, args.seed, bar)
        else:
            pruner = Pruner(runner, method, allocation).run(windows, bar)
            if not plan.variant:  # it meets the ratio only approximately
                target = allocation.sparsity
        sparsity = SparsityCheck(runner, target, pruner.left_dense)
    job.print(*pruner.summary())
    job.outcome.results |= {"notes": pruner.summary()[1:], "sparsity": sparsity.record()}
    if errors := pruner.errors():
        job.outcome.results["errors"] = errors
    if args.save_masks:
        masks = packed_masks(runner, pruner.pruned)
        if job.dist.is_main:
            write_masks(args.save_masks, masks)
            job.print(f"masks: {args.save_masks}")
    if plan.removes:
        job.outcome.results[plan.removes] = pruner.record() | {
            "bytes_before": size,
            "bytes_after": parameter_bytes(runner.model, runner.save_dtype),
        }
    return sparsity


def allocate(job: Job, runner: BlockRunner) -> Allocation:
    """Return the sparsity of every linear layer."""
    args, windows, sparsity = job.args, job.texts.windows, job.plan.sparsity
    rule, gradients = args.allocation, job.plan.method_class.needs_gradients
    total = len(runner.blocks) * ((rule == "owl") + 2 * (rule == "error" or gradients))
    choose = partial(choose_allocation, runner, windows, sparsity, rule, args.seed)
    allocation = kept_allocation(runner) if total else choose()
    if allocation is None:
        with job.timed("allocate", "measuring errors", total) as bar:
            allocation = choose(bar, gradients=gradients)
    job.outcome.layers = {name: each.ratio for name, each in allocation.sparsity.items()}
    if rule == "uniform":
        return allocation
    shares = {name: round(ratio, 6) for name, ratio in job.outcome.layers.items()}
    job.print(f"sparsity of the layers: {min(shares.values())} to {max(shares.values())}")
    job.outcome.results["allocation"] = shares
    return allocation


def check_zeros(job: Job, runner: BlockRunner) -> None:
    """Report zeros that become levels. Raises UserError if they must come from pruning."""
    form = FORMATS[job.plan.format]
    if form.zero or not (share := SparsityCheck(runner).overall):
        return
    if share > MOST_ZEROS:
        raise UserError(
            f"--quantize {form.name}: it has no 0, and {share:.0%} of the weights of --model "
            f"{job.args.model} are pruned. Use --quantize q4_0, or the dense model."
        )
    job.print(f"{form.name} has no 0: the {share:.2%} of the weights that are 0 get a level")


def measure_sparsity(job: Job, runner: BlockRunner, sparsity: SparsityCheck) -> dict:
    """Measure the zeros again; none may be lost if the format has a 0."""
    keeps = FORMATS[job.plan.format].zero
    return (sparsity.recheck(runner) if keeps else SparsityCheck(runner)).record()


def quantize(
    job: Job, runner: BlockRunner, sparsity: SparsityCheck
) -> dict[str, tuple[Tensor, Grid]]:
    """Quantize linear layers with calibration text; return the master weights, if it is trained."""
    plan, masters = job.plan, None
    if plan.tokens:  # low-rank training has no memory for float32 masters
        masters = runner.save_dtype if job.schedule.rank else torch.float32
    with job.timed("quantize", "quantizing", len(runner.blocks)) as bar:
        quantizer = quantize_linears(runner, job.texts.windows, FORMATS[plan.format], masters, bar)
    job.print(*quantizer.summary())
    results = job.outcome.results
    results["notes"] = results.get("notes", []) + quantizer.summary()[1:]
    results["sparsity"] = measure_sparsity(job, runner, sparsity)
    return quantizer.master_weights


def recover(
    job: Job,
    runner: BlockRunner,
    teacher: BlockRunner,
    sparsity: SparsityCheck,
    master_weights: dict[str, tuple[Tensor, Grid]],
    reference: DenseReference,
) -> dict[str, Tensor]:
    """Train the kept weights, check that every zero is still zero, and return the scales."""
    plan, schedule, text = job.plan, job.schedule, job.texts.training
    tests = job.texts.tests if plan.method or plan.teacher or master_weights else []
    with job.timed("measure before", "measuring before", 1 + len(tests), "text") as bar:
        held_out = perplexity(teacher, text.held_out)
        bar(1)
        windows = [test.windows for test in tests]
        figures = perplexities(runner, windows, reference=reference, only_compared=True)
        bar(len(tests))
    records = (evaluation_record(*pair, True) for pair in zip(tests, figures, strict=True))
    trained = dict(whole=plan.trains_all or job.smaller, master_weights=master_weights)
    recoverer = Recoverer(runner, teacher, schedule, text, **trained)
    tokens = schedule.steps * schedule.windows * schedule.seqlen
    job.print(*recoverer.summary())
    with job.timed("recover", "recovering", tokens, "token") as bar:
        recoverer.run(bar)
    job.print(recoverer.line())
    job.outcome.results["sparsity"] = measure_sparsity(job, runner, sparsity)
    job.outcome.results["recovery"] = recoverer.record() | {
        "teacher": job.args.teacher or job.args.model,
        "text": text.record,
        "held_out": {"dense": held_out},
        "before": {one["name"]: {key: one.get(key) for key in BEFORE} for one in records},
    }
    return recoverer.scales


def first_logits(job: Job, runner: BlockRunner) -> Tensor:
    """Return logits at the beginning of the first test window."""
    window = job.texts.tests[0].ids[:1, :COMPARED_POSITIONS]
    return some_logits(runner.model, window.to(job.device))


def check_quantized(job: Job, runner: BlockRunner, before: Tensor) -> None:
    """Check and record that conversion will change no linear layer; `before`: `first_logits`."""
    form = FORMATS[job.plan.format]
    record = check_quantized_weights(runner, form)
    record["difference"] = relative_difference(before, first_logits(job, runner))
    job.outcome.results["quantized"] = record
    job.print(
        f"{form.name}: {form.promise} {record['tensors']} tensors; quantization changed the "
        f"logits by {record['difference']:.2%}"
    )


def pack(
    job: Job,
    runner: BlockRunner,
    scales: dict[str, Tensor] | None,
    unrounded: Tensor | None,
) -> None:
    """Pack every sparse linear layer. Raises UserError if outputs on a window differ."""
    window = job.texts.tests[0].ids[:1].to(job.device)
    with job.timed("pack"):
        record = pack_(runner, FORMATS[job.plan.format], window, scales, unrounded)
    job.outcome.results |= record


def evaluate(job: Job, runner: BlockRunner, reference: DenseReference | None) -> None:
    """Measure perplexity and KL divergence from the dense model on all test sets, in one pass."""
    tests, dist = job.texts.tests, job.dist
    windows = sum(dist.count(len(test.windows)) for test in tests)
    with job.timed("eval", "perplexity", windows, "window") as bar:
        figures = perplexities(runner, [test.windows for test in tests], bar, reference)
    records = [evaluation_record(test, each) for test, each in zip(tests, figures, strict=True)]
    results, losses = job.outcome.results, job.outcome.losses
    for number, (test, each) in enumerate(zip(tests, figures, strict=True)):
        losses[f"{number}.document"] = test.documents.int()
        losses |= {f"{number}.{name}": values for name, values in each["by_window"].items()}
    results["evaluation"] = records
    results["perplexity"] = {each["name"]: each["perplexity"] for each in records}
    if "sparsity" not in results:
        results["sparsity"] = SparsityCheck(runner).record()


def record(job: Job, runner: BlockRunner) -> None:
    """Write results.json, log_METHOD.txt and the saved model's card."""
    folder = Path(job.args.save)
    folder.mkdir(parents=True, exist_ok=True)
    keep_other_results(folder, job.fingerprint)
    finish_results(job, runner)
    if job.outcome.layers:
        text = json.dumps(job.outcome.layers, indent=0) + "\n"
        write_text(folder / ALLOCATION, text)
    write_log(folder, job.outcome.results)
    if job.args.save_model:
        write_card(job, job.args.save_model)
    job.outcome.results["losses"] = write_losses(folder, job.outcome.losses)
    write_results(folder, job.outcome.results)  # marks the run as finished
    job.outcome.is_recorded = True


def run_tasks(job: Job, runner: BlockRunner) -> None:
    """Run tasks of lm-eval on the model and, if it was changed, on the dense one; print figures."""
    args, results = job.args, job.outcome.results
    options = dict(batch_size=job.batch_size, include_path=args.include_path)
    with job.timed("tasks"):
        results["tasks"] = tasks.run_tasks(runner.model, job.tokenizer, args.tasks, **options)
        if job.plan.changes and not args.teacher:
            original = job.vocabulary.original_tokenizer if job.vocabulary else job.tokenizer
            runner.model.to("meta")  # frees memory for the dense model
            with ExitStack() as cleanup:
                dense = load(replace(job, schedule=None), cleanup, None).model
                results["dense_tasks"] = tasks.run_tasks(dense, original, args.tasks, **options)
    write_results(Path(args.save), results)
    print(*tasks.task_lines(results["tasks"], results.get("dense_tasks")), sep="\n", flush=True)
