"""Prune a causal language model for one language: load, prune, check, evaluate, record, save.

    python main.py --model MODEL --prune_method wanda --calibration_data DIR --save_model OUT

Everything that can fail cheaply fails before the weights are loaded, and what is heavy to import
is imported after the flags are known to be good.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lib.run.flags import build_parser, check_flags
from lib.run.setup import Loaded
from lib.util.command import run


def main(argv: list[str]) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    job = Job(args)
    try:
        job.run()
    except BaseException as error:
        if job.team:
            job.team.fail(error, args.debug)
        raise


class Job(Loaded):
    """One run of the command line; its steps are called in the order in which they stand."""

    def run(self) -> None:
        """All steps of the run."""
        with self.finally_:
            self.steps()

    def steps(self) -> None:
        self.check()
        self.load()
        if not self.args.eval_only:
            self.prune()
        if self.args.replace_sparse_layers:
            self.swap()
        self.evaluate()
        self.team.close()
        if self.team.leads:
            self.record()
            if self.args.save_model:
                self.save()
            if self.journal:
                self.journal.remove()

    def prune(self) -> None:
        """Prune every linear of the decoder blocks, and see that the sparsity was reached."""
        from lib.model.pretrained import saved_dtype
        from lib.prune import Pruner
        from lib.pruning.check import measure
        from lib.pruning.journal import Journal
        from lib.util.progress import progress

        args = self.args
        if args.resume and self.team.leads:
            self.journal = Journal(args.resume, self.facts())
        if args.allocation == "owl":
            self.allocate()
        pruner = Pruner(
            self.runner,
            self.blocks_name,
            self.recipe,
            self.sparsity,
            saved_dtype(args.dtype, self.config),
            self.team,
            self.journal,
        )
        blocks = len(self.blocks)
        with self.timed("prune"), progress(blocks, "pruning", "block", self.team.leads) as bar:
            pruned = pruner.run(self.windows, self.batch_size, self.keep_on, bar)
        if self.team.leads:
            print(*pruned.summary(), sep="\n")
            asked = None if args.use_variant else self.sparsity  # the variant only comes near
            measure(self.runner, self.blocks_name, asked, frozenset(pruned.why))

    def allocate(self) -> None:
        """Give every block a sparsity of its own."""
        from lib.pruning.owl import owl
        from lib.util.progress import progress

        ratio, blocks, leads = self.args.sparsity_ratio, len(self.blocks), self.team.leads
        with self.timed("allocate"), progress(blocks, "outliers", "block", leads) as bar:
            self.sparsity = owl(
                self.runner, self.windows, self.batch_size, ratio, self.team, self.keep_on, bar
            )
        self.allocation = [round(sparsity.ratio, 6) for sparsity in self.sparsity]
        if leads:
            print(f"sparsity of the blocks: {min(self.allocation)} to {max(self.allocation)}")

    def swap(self) -> None:
        """Pack every 2:4 linear, and see on one window that the outputs are the same."""
        from lib.eval import some_logits
        from lib.model.pretrained import footprint
        from lib.sparse import check_same_outputs, swap_linears_
        from lib.util.host import gib

        window = self.test_sets[0].windows[:1].to(self.device)
        before, size = some_logits(self.model, window), footprint(self.model)
        report = swap_linears_(self.model, self.blocks, self.device)
        check_same_outputs(before, some_logits(self.model, window))
        if self.team.leads:
            print(report)
            print(f"footprint: {gib(size)} dense, {gib(footprint(self.model))} packed")

    def evaluate(self) -> None:
        """Perplexity on every test set, in one runner."""
        from lib.eval import perplexities
        from lib.util.progress import progress

        self.evaluation = []
        self.team.at("the evaluation")
        sets = [test.windows for test in self.test_sets]
        total, shown = sum(map(len, sets)), self.team.leads
        with self.timed("eval"), progress(total, "perplexity", "window", shown) as bar:
            measured = perplexities(self.runner, sets, self.batch_size, self.team, bar)
        for test, found in zip(self.test_sets, measured, strict=True):
            figures = {
                "perplexity": found.value,
                "standard_error": found.standard_error,
                "bits_per_byte": found.bits_per_byte(test.bytes),
            }
            self.evaluation.append(test.record | figures)

        self.tasks = None
        if self.args.tasks and self.team.leads:
            from lib.eval import run_tasks

            with self.timed("tasks"):
                self.tasks = run_tasks(self.model, self.tokenizer, self.args.tasks, self.batch_size)

    def record(self) -> None:
        """log_METHOD.txt, results.json, and the summary on the terminal."""
        from lib.model.pretrained import footprint
        from lib.pruning.check import measure
        from lib.report.results import write_results
        from lib.run import record
        from lib.util.host import peak_memory

        args = self.args
        self.footprint["after"] = footprint(self.model)
        self.results = {
            "model": args.model,
            "method": self.method,
            "sparsity_type": args.sparsity_type if self.recipe else None,
            "sparsity_ratio": args.sparsity_ratio if self.recipe else None,
            "options": self.recipe.settings if self.recipe else {},
            **({"allocation": self.allocation} if self.allocation else {}),
            "flags": vars(args),
            "seed": args.seed,
            "versions": record.versions(),
            "device": record.device_name(self.device),
            "bos": self.bos,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            **({"tasks": self.tasks} if self.tasks else {}),
            "perplexity": {test["name"]: test["perplexity"] for test in self.evaluation},
            "sparsity": measure(self.runner, self.blocks_name).record(),
            "seconds": self.seconds,
            "peak_memory": peak_memory(self.device),
            "footprint": self.footprint,
        }
        folder = Path(args.save)
        folder.mkdir(parents=True, exist_ok=True)
        sparsity = self.results["sparsity"]["overall"]
        record.write_log(folder, self.method, sparsity, self.results["perplexity"])
        write_results(folder, self.results)
        record.print_summary(self.results)

    def save(self) -> None:
        """Model, tokenizer and card, staged; then results.json once more with the time it took."""
        from lib.model.pretrained import save_model, saved_dtype
        from lib.report.results import write_results
        from lib.run.card import languages_of, model_card, packed_card
        from lib.util.files import staged_folder

        args = self.args
        with self.timed("save"), staged_folder(args.save_model, "--save_model") as stage:
            if self.runner.placement:
                self.runner.placement.settle()
            save_model(self.model, stage, saved_dtype(args.dtype, self.config))
            self.tokenizer.save_pretrained(stage)
            read = self.sources if self.calibrated else ()  # magnitude reads no text
            languages = languages_of([source.name for source in read])
            extra = packed_card(args.save_model) if args.replace_sparse_layers else []
            (stage / "README.md").write_text(model_card(self.results, languages, extra), "utf-8")
        write_results(Path(args.save), self.results)
        print(f"saved: {args.save_model}")


if __name__ == "__main__":
    sys.exit(run(main))
