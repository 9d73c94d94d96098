"""Prune a causal language model for one language: check, load, prune, recover, save, evaluate.

    python main.py --model MODEL --prune_method sparsegpt --sparsity_ratio 0.5 \\
        --sparsity_type unstructured --nsamples 64

`run` is the whole run, step by step. `check` makes everything that can fail cheaply fail before a
weight is read. An error before the model is saved ends the run and keeps finished blocks; a later
error can lose nothing.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if __package__:  # installed: lib/ is the package langprune, and this file is inside it
    from .run.flags import build_parser, check_flags
    from .util import cli
else:
    from lib.run.flags import build_parser, check_flags
    from lib.util import cli

if TYPE_CHECKING:
    from lib.run.run import Run


def main(argv: list[str]) -> None:
    parser = build_parser()
    flags = parser.parse_args(argv)
    check_flags(parser, flags)
    # imports torch and transformers, which --help does not need
    if __package__:
        from .run.check import check
    else:
        from lib.run.check import check
    run(check(flags))


def run(run: Run) -> dict[str, Any]:
    """Do the run and return what results.json holds, in the main rank."""
    if __package__:
        from .run import completions, load, record, save, steps
    else:
        from lib.run import completions, load, record, save, steps
    flags, results = run.flags, run.results
    with ExitStack() as cleanup:
        cleanup.callback(save.close_folder, run)
        runner = load.load(run, cleanup, run.folder)
        results |= record.base_results(run, runner)
        if flags.quantizes:
            steps.check_zeros(run, runner)
        has_teacher = flags.recover or flags.teacher
        teacher = load.load_teacher(run, runner, cleanup) if has_teacher else None
        run.windows = steps.resolve_bos(run, teacher or runner)
        texts, reference = completions.Completions(run, runner), None
        if flags.has_dense:
            dense = teacher if flags.teacher else runner
            texts.generate("dense", dense.model)
            reference = steps.dense_reference(run, dense)
            del dense  # a teacher takes the memory of a whole model
        untouched = steps.first_logits(run, runner) if flags.fake_quantizes else None
        sparsity = steps.prune(run, runner)
        unrounded = steps.first_logits(run, runner) if flags.quantizes and flags.packs else None
        master_weights = steps.quantize(run, runner, sparsity) if flags.quantizes else {}
        scales = None
        if flags.recover:
            scales = steps.recover(run, runner, teacher, sparsity, master_weights, reference)
        del teacher, master_weights
        if flags.fake_quantizes:
            steps.check_quantized(run, runner, untouched)
        if flags.packs:
            steps.pack(run, runner, scales, unrounded)
        if flags.save_model:
            save.save(run, runner, cleanup)
        steps.evaluate(run, runner, reference)
        texts.generate("model", runner.model)
        run.dist.close()
        if not run.dist.is_main:
            return {}
        results["completions"] = texts.records()
        if answers := texts.answers():
            results["answers"] = answers
        steps.record(run, runner)
        record.print_summary(results)
        if flags.tasks:
            steps.run_tasks(run, runner)
    return results


if __name__ == "__main__":
    sys.exit(cli.run(main))
