"""Where a run's seconds go, and how they grow: `--profile` and `--scaling` of bench.py."""

from __future__ import annotations

import argparse
import gc
import io
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from lib.report.plots import style as plot_style

PARTS = ("forward", "statistics", "factorisation", "solve", "masks", "moving", "other")
GROWTH = (1, 2, 4)  # times the smallest
LAYERS = 4  # of the random models whose width grows
LONGEST = 2048  # tokens of their windows


class Range:
    """Stands in for torch's record_function: adds up seconds by name, without those of inner ones.

    torch's profiler would note every operation, which takes longer than the solver's own.
    """

    seconds: dict[str, float] = {}
    open_since: list[list] = []  # innermost last: [name, time from which its seconds count]

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def _count(cls) -> float:
        now = time.perf_counter()
        if cls.open_since:
            name, since = cls.open_since[-1]
            cls.seconds[name] = cls.seconds.get(name, 0.0) + now - since
        return now

    def __enter__(self) -> None:
        self.open_since.append([self.name, self._count()])

    def __exit__(self, *exception) -> None:
        now = self._count()
        self.open_since.pop()
        if self.open_since:
            self.open_since[-1][1] = now


class Passes:
    """Counts what goes through a model's blocks, in units of one pass of all tokens.

    Products with their linears, by the weights that are multiplied, and attention apart.
    """

    def __init__(self) -> None:
        self.linear = self.attention = 0.0

    @contextmanager
    def counting(self, blocks, tokens: int) -> Iterator[None]:
        """Inside, what `tokens` tokens in all take through `blocks` is added up."""
        from torch.nn import functional as F

        within = {id(one) for block in blocks for one in block.parameters() if one.dim() == 2}
        shapes = {tuple(one.shape) for block in blocks for one in block.parameters()}
        whole = tokens * sum(
            one.numel() for block in blocks for one in block.parameters() if id(one) in within
        )
        linear, attention = F.linear, F.scaled_dot_product_attention

        def count_linear(x, weight, bias=None):
            if tuple(weight.shape) in shapes:  # also of a copy of a block
                self.linear += x.numel() / x.shape[-1] * weight.numel() / whole
            return linear(x, weight, bias)

        def count_attention(query, *args, **kwargs):
            self.attention += query.shape[0] * query.shape[-2] / tokens / len(blocks)
            return attention(query, *args, **kwargs)

        F.linear, F.scaled_dot_product_attention = count_linear, count_attention
        try:
            yield
        finally:
            F.linear, F.scaled_dot_product_attention = linear, attention


def pruned_in(
    args: argparse.Namespace, method: str, kind: str, passes: Passes | None = None, **changed
) -> float:
    """Seconds of pruning in this process, with flags of main.py changed."""
    from lib.run.check import check
    from lib.run.flags import build_parser
    from lib.run.load import load
    from main import prune

    flags = {"nsamples": args.nsamples, "seqlen": args.seqlen, "model": args.model} | changed
    argv = [f"--{name}={value}" for name, value in flags.items()]
    argv += ["--device", args.device, "--dtype", args.dtype, "--prune_method", method]
    argv += ["--sparsity_type", kind, "--calibration_data", args.calibration_data]
    job = check(build_parser().parse_args(argv))
    with ExitStack() as at_end, redirect_stdout(io.StringIO()):
        loaded = load(job, at_end)
        Range.seconds.clear()
        tokens = job.texts.windows.numel()
        with (passes or Passes()).counting(loaded.blocks, tokens):
            prune(job, loaded)
    del loaded
    gc.collect()
    return job.seconds["prune"]


def profile(args: argparse.Namespace, folder: Path) -> None:
    """Print and draw the seconds of every method and type by what they were spent on."""
    import torch.profiler

    torch.profiler.record_function = Range  # before the package binds the name
    runs: dict[str, dict[str, float]] = {}
    for method in args.methods:
        for kind in args.types:
            passes = Passes()
            total = pruned_in(args, method, kind, passes)
            parts = dict(Range.seconds)
            parts["other"] = total - sum(parts.values())
            runs[f"{method} {kind}"] = parts
            shares = ", ".join(f"{name} {parts.get(name, 0.0):.1f}" for name in PARTS)
            print(f"{method} {kind}: {total:.1f} s = {shares}", flush=True)
            print(
                f"    passes through a block: {passes.linear:.2f} in its linears, "
                f"{passes.attention:.2f} in attention",
                flush=True,
            )
    picture = plot_style.figure(8, 1.5 + 0.5 * len(runs))
    axes = picture.subplots()
    left = dict.fromkeys(runs, 0.0)
    for name, colour in zip(PARTS, (*plot_style.COLOURS, plot_style.GREY), strict=True):
        widths = [parts.get(name, 0.0) for parts in runs.values()]
        axes.barh(list(runs), widths, left=list(left.values()), label=name, color=colour)
        left = {run: left[run] + width for run, width in zip(runs, widths, strict=True)}
    axes.set_xlabel("seconds of pruning")
    axes.invert_yaxis()
    plot_style.open_axes(axes)
    picture.legend(loc="outside lower center", ncols=4, frameon=False)
    plot_style.title(picture, f"Where the time goes: {args.nsamples} x {args.seqlen} tokens")
    picture.savefig(folder / "profile.png", dpi=plot_style.DOTS_PER_INCH)
    print(f"chart: {folder / 'profile.png'}")


def scaling(args: argparse.Namespace, folder: Path) -> None:
    """Print and draw how pruning grows with windows, tokens of a window, and width."""
    import numpy
    from matplotlib.ticker import LogLocator

    series = {
        "windows": [{"nsamples": max(1, args.nsamples // (4 // step))} for step in GROWTH],
        "tokens of a window": [{"seqlen": args.seqlen // (4 // step)} for step in GROWTH],
        "width": [{"model": random_model(args.model, folder, 256 * step)} for step in GROWTH],
    }
    picture = plot_style.figure(9, 4)
    panels = picture.subplots(1, len(series), sharey=True)
    for axes, (name, changes) in zip(panels, series.items(), strict=True):
        for index, method in enumerate(args.methods):
            seconds = [pruned_in(args, method, args.types[0], **change) for change in changes]
            slope, _ = numpy.polyfit(numpy.log(GROWTH), numpy.log(seconds), 1)
            listed = ", ".join(f"{value:.2f}" for value in seconds)
            print(f"{method}, {name} x1, x2, x4: {listed} s, slope {slope:.2f}", flush=True)
            colour = plot_style.pick(plot_style.COLOURS, index)
            axes.loglog(GROWTH, seconds, "o-", color=colour, label=f"{method}: slope {slope:.2f}")
        axes.set_xticks(GROWTH, [f"x{step}" for step in GROWTH])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.legend(frameon=False, fontsize=8)
        plot_style.open_axes(axes)
    panels[0].set_ylabel("seconds of pruning")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    plot_style.title(picture, f"Time of pruning against size, {args.types[0]}")
    picture.savefig(folder / "scaling.png", dpi=plot_style.DOTS_PER_INCH)
    print(f"chart: {folder / 'scaling.png'}")


def random_model(name: str, folder: Path, width: int) -> Path:
    """A LLaMA of random weights, `width` wide, with the tokenizer of model `name`."""
    import torch
    from measure import random_llama
    from transformers import AutoTokenizer

    target = folder / f"random-{width}"
    if not (target / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(name)
        torch.manual_seed(0)
        shape = width, 3 * width, LAYERS, len(tokenizer), LONGEST
        random_llama(*shape, tied=True).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target
