"""The next steps of a run: room in memory, the dense model, its sweep, its BOS token."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from lib.prepare import Prepared

if TYPE_CHECKING:
    from torch import nn

    from lib.estimate import Room


class Loaded(Prepared):
    """The model and the sweep over its blocks."""

    def load(self) -> None:
        from lib import model
        from lib.finite import check_weights
        from lib.memory import keep_freed_memory
        from lib.placement import Placement, device_map
        from lib.sweep import Sweep

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
            placement = Placement(self.blocks, self.device, rounding, self.folder)
        self.sweep = Sweep(self.model, self.blocks, self.device, placement)
        if placement is None:  # otherwise every block is checked when it is fetched
            check_weights(self.sweep)
        self.sweep.verify()
        self.settle_bos()
        self.footprint = {"before": model.footprint(self.model)}

    def see_memory(self) -> Room:
        """Tell how much memory the run will take, and where."""
        from lib.estimate import Plan, check_memory
        from lib.model import checkpoint_dtype, pick_dtype, saved_dtype
        from lib.quantised import stored_bits
        from lib.shapes import shapes

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
        from lib.offload import unmapped

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
        from lib.bos import needs_bos, own_bos

        bos = own_bos(self.tokenizer) if self.args.bos == "auto" else None
        if bos is not None and needs_bos(self.sweep, self.test_sets[0].windows, bos):
            if self.team.leads:
                print("the model collapses without its BOS token: every window begins with it")
            self.bos = bos
            self.read_texts()
        self.agree()  # each has decided for itself
