"""The first steps of a run: what can be known, and what can fail, before any weight is read.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lib.methods import Recipe
from lib.sparsity import Sparsity

# flags that change where a result goes and how fast, not what it is
PLACES = ("save", "save_model", "cache_dir", "device", "offload", "resume", "eval_data", "debug")


class Prepared:
    """Flags, outputs, texts, device, config, tokenizer, windows; the blocks of the bare model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.method = args.prune_method or "dense"
        options = {"variant": True} if args.use_variant else {}
        options |= {} if args.blend is None else {"blend": args.blend}
        self.recipe = Recipe(args.prune_method, options) if args.prune_method else None
        self.calibrated = bool(self.recipe and self.recipe.observes)
        self.sparsity = Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
        self.allocation: list[float] | None = None  # sparsities of the blocks, where they differ
        self.seconds: dict[str, float] = {}
        self.journal = None
        self.team = None
        self.folder = None  # for blocks that are kept on disk
        self.finally_ = ExitStack()  # what goes at the end of the run, whatever happens

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
        check_format(args.model, self.config, args.load_bit, bool(args.prune_method), args.offload)
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
