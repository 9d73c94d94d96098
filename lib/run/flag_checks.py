"""Checks of the flags alone: each mistake is one line with the flag, its value and the way out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lib.methods.registry import METHODS
from lib.methods.sparsity import ALLOCATION_SPAN, NEURONS, UNSTRUCTURED, Sparsity
from lib.run.flags import FLAGS, HESSIAN, rounds

FEWEST_ZEROS = 1 / 16  # of 16-bit weights: they pay for the packed form's one bit per weight


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit through parser.error (status 2) if flags contradict each other or have no effect."""
    for mistake in _mistakes(args):
        parser.error(mistake)


def _mistakes(args: argparse.Namespace) -> Iterator[str]:
    for flag in FLAGS.values():
        if mistake := flag.mistake(args, FLAGS):
            yield mistake
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except ValueError as error:
        yield str(error)
    for flag in FLAGS.values():
        if misfit := flag.misfit(args, FLAGS):
            yield misfit
    does_something = args.prune_method or args.eval_only or args.recover or args.trim_vocabulary
    if not (does_something or rounds(args)):
        yield f"--prune_method: name one of {', '.join(METHODS)}, or give --eval_only"
    if args.rounding == HESSIAN and args.eval_only:
        yield (
            f"--rounding {HESSIAN}: reads calibration text, which --eval_only does not; leave out "
            "--eval_only"
        )
    yield from _ratio_mistakes(args)
    if args.save_model:
        yield from _target_mistakes(args)


def _ratio_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield the mistakes of flags that need another sparsity ratio."""
    ratio = args.sparsity_ratio
    if args.prune_method and args.sparsity_type == NEURONS:
        yield from _neuron_mistakes(args)
    if not args.prune_method or args.sparsity_type != UNSTRUCTURED:
        return
    if args.recover and ratio == 0:
        yield f"--recover {args.recover}: with --sparsity_ratio 0 there is nothing to recover"
    if args.replace_sparse_layers and ratio <= FEWEST_ZEROS:
        yield (
            f"--replace_sparse_layers: with --sparsity_ratio {ratio:g} nothing is smaller packed; "
            f"give more than {FEWEST_ZEROS:g}, or leave it out"
        )
    if args.allocation == "owl" and not ALLOCATION_SPAN <= ratio <= 1 - ALLOCATION_SPAN:
        bounds = f"from {ALLOCATION_SPAN:g} to {1 - ALLOCATION_SPAN:g}"
        yield f"--allocation owl: needs a --sparsity_ratio {bounds}, not {ratio:g}"


def _neuron_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield the mistakes of flags that do not work with removing whole neurons."""
    given = f"--sparsity_type {NEURONS}"
    if args.sparsity_ratio == 0:
        yield f"--sparsity_ratio 0: with {given} no neuron would go; give more"
    if args.load_bit:
        yield f"{given}: quantised weights can't be cut; leave out --load_bit {args.load_bit}"
    if args.replace_sparse_layers:
        yield (
            f"{given}: leaves no zeros for --replace_sparse_layers; leave it out, or prune the "
            "smaller model by a second run"
        )


def _target_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield the mistakes of --save_model, which replaces a whole folder."""
    target = args.save_model
    if args.eval_only and not args.replace_sparse_layers and not args.trim_vocabulary:
        yield f"--save_model {target}: --eval_only changes no weight; leave it out"
    for name in ("save", "model", "offload", "resume", "teacher"):
        value = getattr(args, name)
        if value and Path(value).resolve().is_relative_to(Path(target).resolve()):
            yield f"--save_model {target}: would replace --{name} {value}; move one"
