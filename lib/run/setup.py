"""The first steps of a run: what can be known, and what can fail, before any weight is read.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from lib.methods.registry import Recipe
from lib.methods.sparsity import Sparsity

if TYPE_CHECKING:
    from torch import nn

    from lib.run.memory import Room


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
        from lib.data.documents import check_source
        from lib.data.sources import has_test, parse_sources
        from lib.util.files import check_output_folder

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
            from lib.eval import check_tasks

            check_tasks(args.tasks)
        from lib.dist.team import Team, local_device
        from lib.model import pretrained as model
        from lib.model.pretrained import forced_bos
        from lib.model.quantised import check_format
        from lib.pruning.inputs import check_widths
        from lib.util.progress import quiet

        quiet()
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
        from lib.data.windows import calibration_windows, test_set

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
        from lib.model.access import weight_files
        from lib.run.record import versions

        kept = {flag: value for flag, value in vars(self.args).items() if flag not in PLACES}
        return {
            **{f"--{flag}": value for flag, value in kept.items()},
            "model config": self.config.to_json_string(),
            "weight files": weight_files(self.args.model),
            "calibration windows": self.calibration and self.calibration["digest"],
            "BOS": self.bos,
            "packages": versions(),
        }


class Loaded(Prepared):
    """The model and what runs its blocks."""

    def load(self) -> None:
        from lib.model import pretrained as model
        from lib.model.blocks import BlockRunner
        from lib.model.finite import check_finite
        from lib.model.placement import BlockPlacement, device_map
        from lib.util.host import keep_freed_memory

        args = self.args
        self.team.at("loading the model")
        keep_freed_memory()
        placement, where = None, {"": self.device}
        room = self.see_memory()
        self.keep_on = room.keep_on
        if args.offload or room.fetched:
            place = "disk" if args.offload else "cpu"
            where = device_map(self.skeleton, self.blocks_name, self.device, place)
        if args.offload:
            self.folder = self.finally_.enter_context(self.offload_folder())
        with self.timed("load"):
            self.model = self.read_model(where)
        self.blocks_name, self.blocks = model.decoder_blocks(self.model)
        if len(where) > 1:
            rounding = model.saved_dtype(args.dtype, self.config)
            placement = BlockPlacement(self.blocks, self.device, rounding, self.folder)
        self.runner = BlockRunner(self.model, self.blocks, self.device, placement)
        if placement is None:  # otherwise every block is checked when it is fetched
            check_finite(self.runner)
        self.runner.verify()
        self.settle_bos()
        self.footprint = {"before": model.footprint(self.model)}

    def see_memory(self) -> Room:
        """Tell how much memory the run will take, and where."""
        from lib.model.pretrained import checkpoint_dtype, pick_dtype, saved_dtype
        from lib.model.quantised import stored_bits
        from lib.run.memory import Plan, check_memory, shapes

        args, team = self.args, self.team
        working = pick_dtype(args.dtype, self.config, self.device)
        stored = checkpoint_dtype(self.config)
        windows = [0 if self.windows is None else len(self.windows)]
        windows += [sum(len(test.windows) for test in self.test_sets)]
        plan = Plan(
            shapes(self.skeleton, self.blocks_name),
            self.recipe,
            *(len(range(count)[team.share(count)]) for count in windows),
            self.seqlen,
            self.batch_size,
            working,
            saved_dtype(args.dtype, self.config),
            args.load_bit or stored_bits(self.config),
            None if stored == working else stored,
            fetched=bool(args.offload),
        )
        room = check_memory(plan, self.device, bool(args.offload))
        if team.leads:
            print(room.line, flush=True)
        return room

    def offload_folder(self) -> AbstractContextManager[str]:
        """This process's part of `--offload`, which has room."""
        from lib.model.placement import check_offload_room, own_folder
        from lib.model.pretrained import pick_dtype, saved_dtype

        args = self.args
        loaded = pick_dtype(args.dtype, self.config, self.device)
        saved = saved_dtype(args.dtype, self.config)
        whole = self.skeleton, self.blocks_name
        check_offload_room(args.offload, args.model, *whole, loaded, saved)
        return own_folder(args.offload, self.team)

    def read_model(self, where: dict) -> nn.Module:
        """The dense model, each part on the device that `where` says; many runs can share it."""
        from lib.model import pretrained as model
        from lib.model.placement import unmapped

        args = self.args
        with unmapped() if self.folder else nullcontext():
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
        from lib.eval import needs_bos
        from lib.model.pretrained import own_bos

        bos = own_bos(self.tokenizer) if self.args.bos == "auto" else None
        if bos is not None and needs_bos(self.runner, self.test_sets[0].windows, bos):
            if self.team.leads:
                print("the model collapses without its BOS token: every window begins with it")
            self.bos = bos
            self.read_texts()
        self.agree()  # each has decided for itself
