"""What runs a sweep has: the product of its flags, without combinations that make no sense."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lib.data.sources import has_test, mixture_name, parse_sources
from lib.methods.registry import MethodSpec
from lib.methods.sparsity import UNSTRUCTURED
from lib.run.flags import build_parser, check_flags
from lib.util.errors import UserError

SET_HERE = (  # flags of main.py that tell the runs of a sweep apart
    "model seed prune_method sparsity_type sparsity_ratio calibration_data prune_on_c4 eval_data"
    " eval_only save save_model"
).split()
FITS = {  # flags that only some runs can have, as (method, type)
    "use_variant": lambda method, kind: method == "wanda" and kind == UNSTRUCTURED,
    **dict.fromkeys(
        "replace_sparse_layers pack_bits recover recover_rank recover_rate recover_ce".split(),
        lambda method, _: bool(method),
    ),
}


@dataclass(frozen=True)
class Planned:
    """One run of the sweep: its name and folder, and the flags that main.py would parse."""

    name: str
    folder: Path
    args: argparse.Namespace


def plan(args: argparse.Namespace, passed_on: Sequence[str]) -> list[Planned]:
    """The runs of a sweep in the order in which they are done, model by model.

    Leaves with status 2 where main.py would, for flags; UserError for sources that make no sense.
    """
    parser = build_parser()
    parser.prog = "main.py"
    named = {word.split("=")[0].removeprefix("--") for word in passed_on}
    for flag in SET_HERE:
        if flag in named:
            parser.error(f"--{flag} after '--': the sweep sets it; use the sweep's own flags")
    for flag in FITS.keys() & named:
        if not any(FITS[flag](*pair) for pair in product(args.methods, args.types)):
            parser.error(f"--{flag} after '--': fits none of these --methods and --types")
    if UNSTRUCTURED not in args.types and set(args.ratios) - {_share(kind) for kind in args.types}:
        given = " ".join(map(str, args.ratios))
        parser.error(f"--ratios {given}: N:M types have their own; add --types {UNSTRUCTURED}")
    mixtures = [_split(text) for text in args.calibration]
    sources = [parse_sources(parts, "--calibration", mixture=True) for parts in mixtures]
    names = _names(args.calibration, map(mixture_name, sources))
    folders = _names(args.models, (Path(model).resolve().name for model in args.models))
    own_tests = dict.fromkeys(s.text for several in sources for s in several if has_test(s))
    tests = args.eval_data or list(own_tests) or ["ubertext"]
    parse_sources(tests, "--eval_data")
    calibrations = dict(zip(names, mixtures, strict=True))
    planned: dict[str, Planned] = {}
    for model, parent in zip(args.models, folders, strict=True):
        for point in _points(args, calibrations, reads="recover" in named):
            name = f"{parent}/{point.name}"
            if name in planned:
                raise UserError(f"--out {args.out}: two runs would be {name}; give no value twice")
            folder = Path(args.out) / name
            argv = ["--model", model, *point.flags, "--eval_data", *tests, "--save", str(folder)]
            if point.method and args.save_models:
                argv += ["--save_model", str(folder / "model")]
            run_args = parser.parse_args([*argv, *passed_on])
            if run_args.trim_vocabulary and not run_args.vocabulary_data:
                # runs compare only where they have the same tokens
                every = (source.text for several in sources for source in several)
                run_args.vocabulary_data = list(dict.fromkeys(every))
            for flag, fits in FITS.items():
                if not fits(point.method, point.kind):
                    setattr(run_args, flag, parser.get_default(flag))
            if run_args.resume:  # finished blocks of different runs must not meet
                run_args.resume = str(Path(run_args.resume) / name)
            check_flags(parser, run_args)
            planned[name] = Planned(name, folder, run_args)
    return list(planned.values())


@dataclass(frozen=True)
class _Point:
    """What to do to a model, whichever it is."""

    name: str
    flags: list[str]
    method: str | None = None
    kind: str | None = None


def _points(
    args: argparse.Namespace, calibrations: dict[str, list[str]], reads: bool
) -> Iterator[_Point]:
    """The dense run, then every pruning.

    A method that observes nothing depends on no calibration text and no seed, unless a run `reads`
    it all the same, to recover on it: it is run once.
    """
    yield _Point("dense", ["--eval_only"])
    for method, kind in product(args.methods, args.types):
        for ratio in args.ratios if kind == UNSTRUCTURED else [_share(kind)]:
            share = f"{100 * ratio:g}" if kind == UNSTRUCTURED else kind.replace(":", "of")
            name = f"{method}-{share}"
            flags = ["--prune_method", method, "--sparsity_type", kind]
            flags += ["--sparsity_ratio", str(ratio)]
            if not (reads or MethodSpec(method).cls.observes):
                yield _Point(name, flags, method, kind)
                continue
            for (text, parts), seed in product(calibrations.items(), args.seeds):
                drawn = ["--seed", str(seed), "--calibration_data", *parts]
                yield _Point(f"{name}-{text}-seed{seed}", flags + drawn, method, kind)


def _share(kind: str) -> float:
    n, m = map(int, kind.split(":"))
    return n / m


def _split(text: str) -> list[str]:
    """`uk=0.5,en=0.5` as two sources; a path that exists is one, whatever is in its name."""
    return [text] if Path(text).expanduser().exists() else text.split(",")


def _names(texts: Sequence[str], short: Iterable[str]) -> list[str]:
    """Names for folders: the short ones, or where two are the same, the whole texts."""
    short = list(short)
    return [
        _slug(name if short.count(name) == 1 else text)
        for text, name in zip(texts, short, strict=True)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_") or "_"
