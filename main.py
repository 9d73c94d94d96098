"""Prune a causal language model for one language: check, load, prune, recover, save, evaluate.

    python main.py --model MODEL --prune_method wanda --calibration_data DIR --save_model OUT

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
    from .util import command
else:
    from lib.run.flags import build_parser, check_flags
    from lib.util import command

if TYPE_CHECKING:
    from lib.run.job import Job


def main(argv: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    # imports torch and transformers, which --help does not need
    run(command.part("run.check").check(args))


def run(job: Job) -> dict[str, Any]:
    """Run the job and return what results.json holds, in the main rank."""
    steps = command.part("run.steps")
    plan, results = job.plan, job.outcome.results
    with ExitStack() as cleanup:
        cleanup.callback(steps.close_store, job)
        runner = steps.load(job, cleanup, job.outcome.folder)
        results |= steps.base_results(job, runner)
        if plan.quantizes:
            steps.check_zeros(job, runner)
        if plan.trims:
            steps.trim(job, runner)
        teacher = steps.load_teacher(job, runner, cleanup) if plan.tokens or plan.teacher else None
        job = steps.resolve_bos(job, teacher or runner)
        completions, reference = steps.Completions(job, runner), None
        if plan.has_dense:
            dense = teacher if plan.teacher else runner
            completions.generate("dense", dense.model)
            reference = steps.dense_reference(job, dense)
            del dense  # a teacher takes the memory of a whole model
        untouched = steps.first_logits(job, runner) if plan.fake_quantizes else None
        sparsity = steps.prune(job, runner)
        unrounded = steps.first_logits(job, runner) if plan.quantizes and plan.packs else None
        master_weights = steps.quantize(job, runner, sparsity) if plan.quantizes else {}
        scales = None
        if plan.tokens:
            scales = steps.recover(job, runner, teacher, sparsity, master_weights, reference)
        del teacher, master_weights
        if plan.fake_quantizes:
            steps.check_quantized(job, runner, untouched)
        if plan.packs:
            steps.pack(job, runner, scales, unrounded)
        if job.args.save_model:
            steps.save(job, runner, cleanup)
        steps.evaluate(job, runner, reference)
        completions.generate("model", runner.model)
        job.dist.close()
        if not job.dist.is_main:
            return {}
        results["completions"] = completions.records()
        if answers := completions.answers():
            results["answers"] = answers
        steps.record(job, runner)
        steps.print_summary(results)
        if job.args.tasks:
            steps.run_tasks(job, runner)
    return results


if __name__ == "__main__":
    sys.exit(command.run(main))
