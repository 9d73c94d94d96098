"""Prune a causal language model for one language: load, prune, check, evaluate, record, save.

    python main.py --model MODEL --prune_method wanda --calibration_data DIR --save_model OUT

Everything that can fail cheaply fails before the weights are loaded, and what is heavy to import
is imported after the flags are known to be good.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lib.command import run
from lib.flag_checks import check_flags
from lib.flags import build_parser
from lib.methods import Recipe
from lib.sparsity import Sparsity

if TYPE_CHECKING:
    from torch import nn

# flags that change where a result goes and how fast, not what it is
PLACES = ("save", "save_model", "cache_dir", "device", "offload", "resume", "eval_data", "debug")


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


class Job:
    """One run of the command line; its steps are called in the order in which they stand."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.method = args.prune_method or "dense"
        options = {"variant": True} if args.use_variant else {}
        self.recipe = Recipe(args.prune_method, options) if args.prune_method else None
        self.calibrated = bool(self.recipe and self.recipe.observes)
        self.sparsity = Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
        self.seconds: dict[str, float] = {}
        self.journal = None
        self.team = None
        self.folder = None  # for blocks that are kept on disk
        self.finally_ = ExitStack()  # what goes at the end of the run, whatever happens

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

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)

    def check(self) -> None:
        """Outputs, texts, device, config, tokenizer and windows: all before any weight."""
        from lib.documents import check_source
        from lib.save import check_output_folder
        from lib.sources import has_test, parse_sources

        args = self.args
        check_output_folder("--save", args.save)
        if args.save_model:
            check_output_folder("--save_model", args.save_model, may_hold="config.json")
        names = args.calibration_data or ["c4" if args.prune_on_c4 else "ubertext"]
        self.sources = parse_sources(names, "--calibration_data", mixture=True)
        with_test = [source.text for source in self.sources if has_test(source)]
        self.tests = parse_sources(args.eval_data or with_test or ["ubertext"], "--eval_data")
        for source in self.sources if self.calibrated else ():
            check_source(source, "train")
        for source in self.tests:
            check_source(source, "test")

        if args.tasks:
            from lib.tasks import check_tasks

            check_tasks(args.tasks)
        from lib import model
        from lib.bos import forced_bos
        from lib.groups import check_widths
        from lib.parallel import Team, local_device
        from lib.quantised import check_format

        model.quiet()
        self.device = local_device(model.pick_device(args.device))
        self.team = Team(self.device)
        self.config = model.load_config(args.model, args.cache_dir, args.trust_remote_code)
        check_format(args.model, self.config, args.load_bit, bool(args.prune_method))
        self.tokenizer = model.load_tokenizer(args.model, args.cache_dir, args.trust_remote_code)
        self.seqlen = model.window_length(self.config, args.seqlen)
        self.batch_size = args.batch_size or model.default_batch_size(self.device, self.seqlen)
        self.skeleton = model.skeleton(self.config, args.trust_remote_code)
        self.blocks_name, blocks = model.decoder_blocks(self.skeleton)
        if args.prune_method:
            check_widths(blocks, self.blocks_name, self.sparsity)
        self.bos = forced_bos(self.tokenizer) if args.bos == "always" else None
        self.read_texts()
        self.agree()

    def agree(self) -> None:
        """UserError where the processes of the job would not do the same."""
        files = {name: size for name, (size, _) in self.facts()["weight files"].items()}
        tests = {test.name: test.record["digest"] for test in self.test_sets}
        self.team.agree(self.facts() | {"weight files": files, "test windows": tests})

    def read_texts(self) -> None:
        from lib.data import calibration_windows, test_set

        args = self.args
        self.windows, self.calibration = None, None
        if self.calibrated:
            self.windows, self.calibration = calibration_windows(
                self.sources, self.tokenizer, args.nsamples, self.seqlen, args.seed, self.bos
            )
        self.test_sets = [
            test_set(source, self.tokenizer, self.seqlen, self.bos) for source in self.tests
        ]

    def load(self) -> None:
        from lib import model
        from lib.finite import check_weights
        from lib.placement import Placement, device_map
        from lib.sweep import Sweep

        args = self.args
        self.team.at("loading the model")
        placement, where = None, {"": self.device}
        fetched = self.see_memory()
        if args.offload or fetched:
            place = "disk" if args.offload else "cpu"
            where = device_map(self.skeleton, self.blocks_name, self.device, place)
        if args.offload:
            self.folder = self.finally_.enter_context(self.offload_folder())
        with self.timed("load"):
            self.model = self.read_model(where)
        self.blocks_name, self.blocks = model.decoder_blocks(self.model)
        if len(where) > 1:
            rounding = model.saved_dtype(args.dtype, self.config)
            placement = Placement(self.blocks, self.device, rounding, self.folder)
        self.sweep = Sweep(self.model, self.blocks, self.device, placement)
        if placement is None:  # otherwise every block is checked when it is fetched
            check_weights(self.sweep)
        self.sweep.verify()
        self.settle_bos()
        self.footprint = {"before": model.footprint(self.model)}

    def see_memory(self) -> bool:
        """Tell how much memory the run will take; whether blocks must be fetched from the host."""
        from lib.estimate import Plan, check_memory
        from lib.model import checkpoint_dtype, pick_dtype, saved_dtype
        from lib.shapes import shapes

        args, team = self.args, self.team
        working = pick_dtype(args.dtype, self.config, self.device)
        stored = checkpoint_dtype(self.config)
        windows = [0 if self.windows is None else len(self.windows)]
        windows += [max(len(test.windows) for test in self.test_sets)]
        plan = Plan(
            shapes(self.skeleton, self.blocks_name),
            self.recipe,
            *(len(range(count)[team.share(count)]) for count in windows),
            self.seqlen,
            self.batch_size,
            working,
            saved_dtype(args.dtype, self.config),
            args.load_bit,
            None if stored == working else stored,
            fetched=bool(args.offload),
        )
        fetched, line = check_memory(plan, self.device, bool(args.offload))
        if team.leads:
            print(line, flush=True)
        return fetched

    def offload_folder(self) -> AbstractContextManager[str]:
        """This process's part of `--offload`, which has room."""
        from lib.model import pick_dtype, saved_dtype
        from lib.offload import check_offload_room, own_folder

        args = self.args
        loaded = pick_dtype(args.dtype, self.config, self.device)
        saved = saved_dtype(args.dtype, self.config)
        whole = self.skeleton, self.blocks_name
        check_offload_room(args.offload, args.model, *whole, loaded, saved)
        return own_folder(args.offload, self.team)

    def read_model(self, where: dict) -> nn.Module:
        """The dense model, each part on the device that `where` says; many runs can share it."""
        from lib import model

        args = self.args
        return model.load_model(
            args.model,
            self.config,
            dtype=model.pick_dtype(args.dtype, self.config, self.device),
            device_map=where,
            offload=self.folder,
            load_bit=args.load_bit,
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
        )

    def settle_bos(self) -> None:
        """Under `--bos auto`, see whether the dense model needs windows that begin with BOS."""
        from lib.bos import needs_bos, own_bos

        bos = own_bos(self.tokenizer) if self.args.bos == "auto" else None
        if bos is not None and needs_bos(self.sweep, self.test_sets[0].windows, bos):
            if self.team.leads:
                print("the model collapses without its BOS token: every window begins with it")
            self.bos = bos
            self.read_texts()
        self.agree()  # each has decided for itself

    def prune(self) -> None:
        """Prune every linear of the decoder blocks, and see that the sparsity was reached."""
        from lib.check import measure
        from lib.journal import Journal
        from lib.model import saved_dtype
        from lib.progress import progress
        from lib.prune import Pruner

        args = self.args
        if args.resume and self.team.leads:
            self.journal = Journal(args.resume, self.facts())
        pruner = Pruner(
            self.sweep,
            self.blocks_name,
            self.recipe,
            self.sparsity,
            saved_dtype(args.dtype, self.config),
            self.team,
            self.journal,
        )
        blocks = len(self.blocks)
        with self.timed("prune"), progress(blocks, "pruning", "block", self.team.leads) as bar:
            pruned = pruner.run(self.windows, self.batch_size, advanced=bar)
        if self.team.leads:
            print(*pruned.summary(), sep="\n")
            asked = None if args.use_variant else self.sparsity  # the variant only comes near
            measure(self.sweep, self.blocks_name, asked, frozenset(pruned.why))

    def facts(self) -> dict:
        """What decides the result: the same in all processes, and when a run goes on."""
        from lib.loading import weight_files
        from lib.record import versions

        kept = {flag: value for flag, value in vars(self.args).items() if flag not in PLACES}
        return {
            **{f"--{flag}": value for flag, value in kept.items()},
            "model config": self.config.to_json_string(),
            "weight files": weight_files(self.args.model),
            "calibration windows": self.calibration and self.calibration["digest"],
            "BOS": self.bos,
            "packages": versions(),
        }

    def swap(self) -> None:
        """Pack every 2:4 linear, and see on one window that the outputs are the same."""
        from lib.model import footprint, some_logits
        from lib.record import gib
        from lib.sparse import check_same_outputs, swap_linears_

        window = self.test_sets[0].windows[:1].to(self.device)
        before, size = some_logits(self.model, window), footprint(self.model)
        report = swap_linears_(self.model, self.blocks, self.device)
        check_same_outputs(before, some_logits(self.model, window))
        if self.team.leads:
            print(report)
            print(f"footprint: {gib(size)} dense, {gib(footprint(self.model))} packed")

    def evaluate(self) -> None:
        """Perplexity on every test set."""
        from lib.eval import perplexity
        from lib.progress import progress

        self.evaluation = []
        self.team.at("the evaluation")
        total = sum(len(test.windows) for test in self.test_sets)
        shown = self.team.leads
        with self.timed("eval"), progress(total, "perplexity", "window", shown) as bar:
            for test in self.test_sets:
                found = perplexity(self.sweep, test.windows, self.batch_size, self.team, bar)
                figures = {
                    "perplexity": found.value,
                    "standard_error": found.standard_error,
                    "bits_per_byte": found.bits_per_byte(test.bytes),
                }
                self.evaluation.append(test.record | figures)

        self.tasks = None
        if self.args.tasks and self.team.leads:
            from lib.tasks import run_tasks

            with self.timed("tasks"):
                self.tasks = run_tasks(self.model, self.tokenizer, self.args.tasks, self.batch_size)

    def record(self) -> None:
        """log_METHOD.txt, results.json, and the summary on the terminal."""
        from lib import record
        from lib.check import measure
        from lib.model import footprint

        args = self.args
        self.footprint["after"] = footprint(self.model)
        self.results = {
            "model": args.model,
            "method": self.method,
            "sparsity_type": args.sparsity_type if self.recipe else None,
            "sparsity_ratio": args.sparsity_ratio if self.recipe else None,
            "options": dict(self.recipe.options) if self.recipe else {},
            "flags": vars(args),
            "seed": args.seed,
            "versions": record.versions(),
            "device": record.device_name(self.device),
            "bos": self.bos,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            **({"tasks": self.tasks} if self.tasks else {}),
            "perplexity": {test["name"]: test["perplexity"] for test in self.evaluation},
            "sparsity": measure(self.sweep, self.blocks_name).record(),
            "seconds": self.seconds,
            "peak_memory": record.peak_memory(self.device),
            "footprint": self.footprint,
        }
        folder = Path(args.save)
        folder.mkdir(parents=True, exist_ok=True)
        sparsity = self.results["sparsity"]["overall"]
        record.write_log(folder, self.method, sparsity, self.results["perplexity"])
        record.write_results(folder, self.results)
        record.print_summary(self.results)

    def save(self) -> None:
        """Model, tokenizer and card, staged; then results.json once more with the time it took."""
        from lib.card import languages_of, model_card, packed_card
        from lib.model import save_model, saved_dtype
        from lib.record import write_results
        from lib.save import staged_folder

        args = self.args
        with self.timed("save"), staged_folder(args.save_model, "--save_model") as stage:
            if self.sweep.placement:
                self.sweep.placement.settle()
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
