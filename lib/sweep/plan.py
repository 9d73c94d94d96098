"""The runs of a sweep: the product of its flags, without combinations that make no sense."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lib.data.sources import mixture_name, parse_sources
from lib.methods.sparsity import NEURONS, RATIO_TYPES, UNSTRUCTURED
from lib.run.flag_checks import check_flags
from lib.run.flags import FLAGS, build_parser
from lib.run.texts import default_tests, reads_train
from lib.util.errors import UserError


@dataclass(frozen=True)
class Planned:
    """One run of the sweep: its name and folder, and the flags that main.py would parse."""

    name: str
    folder: Path
    args: argparse.Namespace


def plan(args: argparse.Namespace, passed_on: Sequence[str]) -> list[Planned]:
    """Return the runs of a sweep in the order in which they are done, model by model.

    A flag after `--` goes to the runs that it fits, as lib/run/flags.py declares. Exits with status
    2 for flags that main.py would refuse; raises UserError for sources that make no sense.
    """
    parser = build_parser()
    parser.prog = "main.py"
    passed = _Passed(parser, passed_on)
    fixed = [kind for kind in args.types if kind not in RATIO_TYPES]
    if fixed == args.types and set(args.ratios) - {_share(kind) for kind in fixed}:
        given = " ".join(map(str, args.ratios))
        parser.error(f"--ratios {given}: N:M types have their own; add --types {UNSTRUCTURED}")
    mixtures = [_split(text) for text in args.calibration]
    sources = [parse_sources(parts, "--calibration", mixture=True) for parts in mixtures]
    names = _names(args.calibration, map(mixture_name, sources))
    folders = _names(args.models, (Path(model).resolve().name for model in args.models))
    tests = args.eval_data or default_tests([source for mixture in sources for source in mixture])
    parse_sources(tests, "--eval_data")
    calibrations = dict(zip(names, mixtures, strict=True))
    planned: dict[str, Planned] = {}
    for model, parent in zip(args.models, folders, strict=True):
        for point in _points(args, calibrations, passed):
            name = f"{parent}/{point.name}"
            if name in planned:
                raise UserError(f"--out {args.out}: two runs would be {name}; give no value twice")
            folder = Path(args.out) / name
            argv = ["--model", model, *point.flags, "--eval_data", *tests, "--save", str(folder)]
            if point.pruned and args.save_models:
                argv += ["--save_model", str(folder / "model")]
            run_args = passed.to_run(argv)
            if run_args.trim_vocabulary and not run_args.vocabulary_data:
                # runs can be compared only with the same tokens
                texts = (source.text for mixture in sources for source in mixture)
                run_args.vocabulary_data = list(dict.fromkeys(texts))
            if run_args.resume:  # each run keeps its finished blocks apart
                run_args.resume = str(Path(run_args.resume) / name)
            check_flags(parser, run_args)
            planned[name] = Planned(name, folder, run_args)
    passed.check_used()
    return list(planned.values())


class _Passed:
    """The flags after `--`, which go to every run that they fit."""

    def __init__(self, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
        self.parser, self.argv = parser, argv
        names = {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
        self.flags = [flag for flag in FLAGS.values() if flag.name in names]
        self.misfits: dict[str, str] = {}  # {flag: reason}, for flags that no run has had so far
        self.used: set[str] = set()
        for flag in self.flags:
            if not flag.in_sweep:
                parser.error(
                    f"--{flag.name} after '--': the sweep sets it; use the sweep's own flags"
                )

    def to_run(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags of one run, with the flags after `--` that fit it."""
        args = self.parser.parse_args([*argv, *self.argv])
        for flag in self.flags:  # in the order of FLAGS, where a flag follows those that it needs
            misfit = flag.misfit(args, FLAGS)
            if misfit or (args.eval_only and not flag.dense):
                self.misfits[flag.name] = misfit or f"--{flag.name}: is for runs that prune"
                setattr(args, flag.name, self.parser.get_default(flag.name))
            else:
                self.used.add(flag.name)
        return args

    def check_used(self) -> None:
        """Exit with status 2 if a flag fits no run of the sweep."""
        for flag in self.flags:
            if flag.name not in self.used:
                reason = self.misfits[flag.name]
                self.parser.error(f"--{flag.name} after '--': fits none of the runs ({reason})")


@dataclass(frozen=True)
class _Point:
    """One point of the sweep: the flags of a run besides its model."""

    name: str
    flags: list[str]
    pruned: bool = True


def _points(
    args: argparse.Namespace, calibrations: dict[str, list[str]], passed: _Passed
) -> Iterator[_Point]:
    """Yield the dense run, then every pruning.

    A pruning that reads no calibration text depends on no set and no seed: it is run once.
    """
    yield _Point("dense", ["--eval_only"], pruned=False)
    for method, kind in product(args.methods, args.types):
        for ratio in args.ratios if kind in RATIO_TYPES else [_share(kind)]:
            share = f"{100 * ratio:g}" if kind in RATIO_TYPES else kind.replace(":", "of")
            share += f"-{NEURONS}" if kind == NEURONS else ""
            name = f"{method}-{share}"
            flags = ["--prune_method", method, "--sparsity_type", kind]
            flags += ["--sparsity_ratio", str(ratio)]
            if not reads_train(passed.to_run(["--model", "any", *flags])):
                yield _Point(name, flags)
                continue
            for (text, parts), seed in product(calibrations.items(), args.seeds):
                drawn = ["--seed", str(seed), "--calibration_data", *parts]
                yield _Point(f"{name}-{text}-seed{seed}", flags + drawn)


def _share(kind: str) -> float:
    n, m = map(int, kind.split(":"))
    return n / m


def _split(text: str) -> list[str]:
    """Split `uk=0.5,en=0.5` into two sources; a path that exists stays whole."""
    return [text] if Path(text).expanduser().exists() else text.split(",")


def _names(texts: Sequence[str], short: Iterable[str]) -> list[str]:
    """Return names for folders: the short names, or the whole texts if two are the same."""
    short = list(short)
    return [
        _slug(name if short.count(name) == 1 else text)
        for text, name in zip(texts, short, strict=True)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_") or "_"
