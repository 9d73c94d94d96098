"""The steps of a run, in the order of main.run."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..calibration import mixed_types
from ..calibration.allocation import Allocation, kept_allocation
from ..calibration.allocation import allocate as choose_allocation
from ..data.windows import WindowSpec
from ..eval import needs_bos, perplexities, perplexity
from ..formats.grids import Grid, Types
from ..formats.registry import AUTO
from ..methods.sparsity import Passes
from ..model.blocks import BlockRunner
from ..model.device import checkpoint_dtype, dtype_name
from ..model.masks import packed_masks, write_masks
from ..model.reference import (
    COMPARED_POSITIONS,
    DenseReference,
    dense_states,
    local_windows,
    shared_states,
    some_logits,
    tail_of,
)
from ..model.saving import parameter_bytes
from ..model.sparsity_check import SparsityCheck
from ..prune import Pruner
from ..sparse import pack_, relative_difference
from ..stages.quantize import check_quantized as check_quantized_weights
from ..stages.quantize import quantize as quantize_linears
from ..stages.recover import Recoverer
from ..stages.remove import remove
from ..util.errors import UserError
from ..util.files import write_text
from ..util.resume import TYPES
from . import lm_eval
from .gguf_size import room_for_types
from .load import load
from .record import (
    evaluation_record,
    finish_results,
    keep_other_results,
    write_log,
)
from .results import write_losses, write_results
from .run import Run
from .save import write_card
from .windows import RunWindows, draw_windows, may_need_bos

ALLOCATION = "allocation.json"  # in --save; an input of --allocation
MOST_ZEROS = 0.25  # share that quantization of the original to 4 bits may have made
BEFORE = "perplexity", "bits_per_byte", "kl", "top1_agreement"


def resolve_bos(run: Run, runner: BlockRunner) -> RunWindows:
    """Return the windows, with BOS in all if `--bos auto` finds that the dense model needs it.

    A continued run keeps the windows that it was begun with, whatever it is evaluated on.
    """
    windows, folder = run.windows, run.folder
    if may_need_bos(run.flags, run.model.tokenizer):
        bos = run.model.tokenizer.bos_token_id
        needs = run.dist.all_gather_object(folder and folder.decided.get("bos"))[0]
        if needs is None:
            needs = needs_bos(runner, windows.tests[0].ids, bos)
        if folder:
            folder.begin(run.fingerprint["pruning"], bos=needs)
        if needs:
            run.print("the model collapses without its BOS token: every window begins with it")
            spec = WindowSpec(run.model.tokenizer, windows.seqlen, bos, run.flags.seed)
            same = partial(replace, run.schedule) if run.schedule else None
            windows = draw_windows(run.flags, run.corpora, spec, same, run.dist)
        run.corpora.free()
    run.dist.check_equal({"BOS": windows.bos})  # each rank decides by itself
    return windows


def dense_reference(run: Run, dense: BlockRunner) -> DenseReference:
    """Return the dense model's hidden states on the test windows, the reference of the evaluation.

    The runs of a sweep compute them once.
    """
    dist, sets = run.dist, [test.windows for test in run.windows.tests]
    windows = sum(len(local_windows(len(each), dist)) for each in sets)

    def compute():
        with run.timed("dense", "dense", windows, "window") as bar:
            return dense_states(dense, sets, bar)

    shares = run.shared and dist.size == 1
    states = shared_states(run.shared, run.dense_key, compute) if shares else compute()
    return DenseReference(tail_of(dense), states)


def prune(run: Run, runner: BlockRunner) -> SparsityCheck:
    """Prune linear layers, or remove neurons or experts; return and check the sparsity."""
    flags, target, windows = run.flags, None, run.windows.calibration
    if not flags.prune_method:
        return SparsityCheck(runner)
    method = flags.method_class
    size = parameter_bytes(runner.model, runner.save_dtype)
    allocation = None if flags.removes else allocate(run, runner)
    with run.timed("prune", "pruning", len(runner.blocks)) as bar:
        if flags.removes:
            layout, left = run.model.layout, run.model.left
            pruner = remove(runner, windows, method, layout, left, flags.seed, bar)
        else:
            pruner = Pruner(runner, method, allocation).run(windows, bar)
            if not flags.use_variant:  # it meets the ratio only approximately
                target = allocation.sparsity
        sparsity = SparsityCheck(runner, target, pruner.left_dense)
    run.print(*pruner.summary())
    run.results |= {"notes": pruner.summary()[1:], "sparsity": sparsity.record()}
    if errors := pruner.errors():
        run.results["errors"] = errors
    if flags.save_masks:
        # every rank fetches the blocks, only the main one keeps masks
        masks = packed_masks(runner, pruner.pruned if run.dist.is_main else ())
        if run.dist.is_main:
            write_masks(flags.save_masks, masks)
            run.print(f"masks: {flags.save_masks}")
    if flags.removes:
        run.results[flags.removes] = pruner.record() | {
            "bytes_before": size,
            "bytes_after": parameter_bytes(runner.model, runner.save_dtype),
        }
    return sparsity


def allocate(run: Run, runner: BlockRunner) -> Allocation:
    """Return the sparsity of every linear layer."""
    flags, windows = run.flags, run.windows.calibration
    rule, method = flags.allocation, flags.method_class
    total = len(runner.blocks) * Passes.of(rule, method).count
    choose = partial(choose_allocation, runner, windows, flags.sparsity, rule, flags.seed)
    allocation = kept_allocation(runner) if total else choose()
    if allocation is None:
        with run.timed("allocate", "measuring errors", total) as bar:
            allocation = choose(bar, method=method)
    run.layers = {name: each.ratio for name, each in allocation.sparsity.items()}
    if rule == "uniform":
        return allocation
    shares = {name: round(ratio, 6) for name, ratio in run.layers.items()}
    run.print(f"sparsity of the layers: {min(shares.values())} to {max(shares.values())}")
    run.results["allocation"] = shares
    return allocation


def check_zeros(run: Run, runner: BlockRunner) -> None:
    """Report zeros that become levels. Raises UserError if they must come from pruning."""
    form = run.form
    if form.has_zero or not (share := SparsityCheck(runner).overall):
        return
    if share > MOST_ZEROS:
        raise UserError(
            f"--quantize {form.name}",
            f"it has no 0, and {share:.0%} of the weights of --model {run.flags.model} are pruned",
            "Use --quantize q4_0, or the dense model",
        )
    run.print(f"{form.name} has no 0: the {share:.2%} of the weights that are 0 get a level")


def measure_sparsity(run: Run, runner: BlockRunner, sparsity: SparsityCheck) -> dict:
    """Measure the zeros again; none may be lost if the format has a 0."""
    keeps = run.form.has_zero
    return (sparsity.recheck(runner) if keeps else SparsityCheck(runner)).record()


def quantize(
    run: Run, runner: BlockRunner, sparsity: SparsityCheck
) -> dict[str, tuple[Tensor, Grid]]:
    """Quantize linear layers with calibration text; return the master weights, if it is trained."""
    if run.flags.format == AUTO:
        run.form = choose_types(run, runner)
    form, windows, masters = run.form, run.windows.calibration, None
    if run.schedule:
        masters = run.schedule.master_dtype(runner.save_dtype)
    with run.timed("quantize", "quantizing", len(runner.blocks)) as bar:
        quantizer = quantize_linears(runner, windows, form, masters, bar)
        if isinstance(form, Types):
            quantizer.quantize_tables_()
    run.print(*quantizer.summary())
    run.results["notes"] = run.results.get("notes", []) + quantizer.summary()[1:]
    run.results["sparsity"] = measure_sparsity(run, runner, sparsity)
    return quantizer.master_weights


def choose_types(run: Run, runner: BlockRunner) -> Types:
    """Choose the type of each tensor for --megabytes."""
    flags, weights = run.flags, runner.weights
    if kept := weights.read_kept(TYPES):
        return Types(kept[1])
    sizes, room = room_for_types(run)
    with run.timed("choose types", "measuring types", 2 * len(runner.blocks)) as bar:
        costs = mixed_types.measure(runner, run.windows.calibration, sizes, flags.seed, bar)
    chosen = mixed_types.choose(costs, sizes, room)
    if weights.finished:
        weights.finished.write(TYPES, {}, chosen)
    bytes_of: Counter[str] = Counter()
    for name, kind in chosen.items():
        bytes_of[kind] += sizes[name][kind]
    left, counts = room - bytes_of.total(), Counter(chosen.values()).most_common()
    types = ", ".join(f"{n} in {kind} ({bytes_of[kind] / 1e6:.3g} MB)" for kind, n in counts)
    tokens = run.windows.calibration[: mixed_types.WINDOWS].ids.numel()
    kl = sum(costs.get(name, {}).get(kind, 0) for name, kind in chosen.items()) / tokens
    size = f"{flags.megabytes - left / 1e6:.4g} MB as GGUF"
    run.print(f"types: {types}; about {size}, with a KL of about {kl:.2g} nats per token")
    return Types(chosen)


def recover(
    run: Run,
    runner: BlockRunner,
    teacher: BlockRunner,
    sparsity: SparsityCheck,
    master_weights: dict[str, tuple[Tensor, Grid]],
    reference: DenseReference,
) -> dict[str, Tensor]:
    """Train the kept weights, check that every zero is still zero, and return the scales."""
    flags, schedule, text = run.flags, run.schedule, run.windows.training
    tests = run.windows.tests if flags.prune_method or flags.teacher or master_weights else []
    with run.timed("measure before", "measuring before", 1 + len(tests), "text") as bar:
        held_out = perplexity(teacher, text.held_out)
        bar(1)
        windows = [test.windows for test in tests]
        figures = perplexities(runner, windows, reference=reference, only_compared=True)
        bar(len(tests))
    records = (evaluation_record(*pair, True) for pair in zip(tests, figures, strict=True))
    trained = dict(whole=run.trains_all, master_weights=master_weights)
    recoverer = Recoverer(runner, teacher, schedule, text, **trained)
    tokens = schedule.steps * schedule.windows * schedule.seqlen
    run.print(*recoverer.summary())
    with run.timed("recover", "recovering", tokens, "token") as bar:
        recoverer.run(bar)
    run.print(recoverer.line())
    run.results["sparsity"] = measure_sparsity(run, runner, sparsity)
    run.results["recovery"] = recoverer.record() | {
        "teacher": flags.teacher or flags.model,
        "text": text.record,
        "held_out": {"dense": held_out},
        "before": {one["name"]: {key: one.get(key) for key in BEFORE} for one in records},
    }
    return recoverer.scales


def first_logits(run: Run, runner: BlockRunner) -> Tensor:
    """Return logits at the beginning of the first test window."""
    window = run.windows.tests[0].ids[:1, :COMPARED_POSITIONS]
    return some_logits(runner.model, window.to(run.device))


def check_quantized(run: Run, runner: BlockRunner, before: Tensor) -> None:
    """Check and record that conversion will change no linear layer; `before`: `first_logits`."""
    form = run.form
    record = check_quantized_weights(runner, form)
    record["difference"] = relative_difference(before, first_logits(run, runner))
    run.results["quantized"] = record
    if (checkpoint := checkpoint_dtype(run.model.config)) != run.model.save_dtype:
        names = map(dtype_name, (run.model.save_dtype, checkpoint))
        note = "Weights of other layers are saved in {}; the checkpoint has {}.".format(*names)
        run.results["notes"] = [*run.results.get("notes", []), note]
    run.print(
        f"{form.name}: {form.conversion_note} {record['tensors']} tensors; "
        f"quantization changed the logits by {record['difference']:.2%}"
    )


def pack(
    run: Run,
    runner: BlockRunner,
    scales: dict[str, Tensor] | None,
    unrounded: Tensor | None,
) -> None:
    """Pack every sparse linear layer. Raises UserError if outputs on a window differ."""
    window = run.windows.tests[0].ids[:1].to(run.device)
    with run.timed("pack"):
        record = pack_(runner, run.form, window, scales, unrounded)
    run.results |= record


def evaluate(run: Run, runner: BlockRunner, reference: DenseReference | None) -> None:
    """Measure perplexity and KL divergence from the dense model on all test sets, in one pass."""
    tests, dist = run.windows.tests, run.dist
    windows = sum(dist.count(len(test.windows)) for test in tests)
    with run.timed("eval", "perplexity", windows, "window") as bar:
        figures = perplexities(runner, [test.windows for test in tests], bar, reference)
    records = [evaluation_record(test, each) for test, each in zip(tests, figures, strict=True)]
    results, losses = run.results, run.losses
    for number, (test, each) in enumerate(zip(tests, figures, strict=True)):
        losses[f"{number}.document"] = test.documents.int()
        losses |= {f"{number}.{name}": values for name, values in each["by_window"].items()}
    results["evaluation"] = records
    results["perplexity"] = {each["name"]: each["perplexity"] for each in records}
    if "sparsity" not in results:
        results["sparsity"] = SparsityCheck(runner).record()


def record(run: Run, runner: BlockRunner) -> None:
    """Write results.json, log_METHOD.txt and the saved model's card."""
    folder = Path(run.flags.save)
    folder.mkdir(parents=True, exist_ok=True)
    keep_other_results(folder, run.fingerprint)
    finish_results(run, runner)
    if run.layers:
        text = json.dumps(run.layers, indent=0) + "\n"
        write_text(folder / ALLOCATION, text)
    write_log(folder, run.results)
    if run.flags.save_model:
        write_card(run, run.flags.save_model)
    run.results["losses"] = write_losses(folder, run.losses)
    write_results(folder, run.results)  # marks the run as finished
    run.is_recorded = True


def run_tasks(run: Run, runner: BlockRunner) -> None:
    """Run tasks of lm-eval on the model and, if it was changed, on the dense one; print figures."""
    flags, results, tokenizer = run.flags, run.results, run.model.tokenizer
    options = dict(batch_size=run.batch_size, include_path=flags.include_path)
    with run.timed("tasks"):
        results["tasks"] = lm_eval.run_tasks(runner.model, tokenizer, flags.tasks, **options)
        if flags.changes and not flags.teacher:
            runner.model.to("meta")  # frees memory for the dense model
            with ExitStack() as cleanup:
                dense = load(replace(run, schedule=None), cleanup, None).model
                results["dense_tasks"] = lm_eval.run_tasks(dense, tokenizer, flags.tasks, **options)
    write_results(Path(flags.save), results)
    print(*lm_eval.task_lines(results["tasks"], results.get("dense_tasks")), sep="\n", flush=True)
