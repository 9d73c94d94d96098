"""What flags alone can get wrong. Imports neither torch nor transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib.methods import METHODS, Recipe
from lib.sparsity import ALLOCATION_SPAN, UNSTRUCTURED, Sparsity


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave through parser.error (status 2) where flags contradict each other or make no sense."""
    for flag, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):
            parser.error(f"--{flag} '': is empty; give a value, or leave the flag out")
    for flag in ("nsamples", "batch_size", "seqlen"):
        value, least = getattr(args, flag), 2 if flag == "seqlen" else 1
        if value is not None and value < least:
            parser.error(f"--{flag} {value}: must be at least {least}")
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except ValueError as error:
        parser.error(str(error))
    method, kind = args.prune_method, args.sparsity_type
    if not method and not args.eval_only:
        parser.error(f"--prune_method: name one of {', '.join(METHODS)}, or give --eval_only")
    if method and args.eval_only:
        parser.error(f"--eval_only prunes nothing; leave out --prune_method {method}")
    if args.use_variant and method != "wanda":
        parser.error(f"--use_variant is a variant of wanda, not of {method or 'the dense model'}")
    if args.use_variant and kind != UNSTRUCTURED:
        parser.error(f"--use_variant: in --sparsity_type {kind} every row has the same share")
    _check_allocation(parser, args)
    if args.blend is not None and method != "admm":
        parser.error(f"--blend {args.blend:g} is for admm, not for {method or 'the dense model'}")
    if args.blend is not None and not 0 <= args.blend <= 1:  # also refuses nan
        parser.error(f"--blend {args.blend:g}: must be from 0 to 1")
    if args.replace_sparse_layers and kind != "2:4" and not args.eval_only:
        parser.error(f"--replace_sparse_layers needs --sparsity_type 2:4, not {kind}")
    if args.load_bit and args.offload:
        parser.error(
            f"--offload {args.offload}: blocks can't be quantised on their way from disk; "
            f"leave out --load_bit {args.load_bit}"
        )
    for flag in ("load_bit", "offload"):
        if args.replace_sparse_layers and getattr(args, flag):
            parser.error(f"--replace_sparse_layers can't be combined with --{flag}; leave out one")
    if args.prune_on_c4 and args.calibration_data:
        parser.error("--prune_on_c4 is short for --calibration_data c4; give only one of them")
    if args.save_model:
        _check_outputs(parser, args)


def _check_allocation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What differs between blocks follows activations, and needs room on both sides."""
    method, given = args.prune_method, f"--allocation {args.allocation}"
    if args.allocation == "uniform":
        return
    if args.sparsity_type != UNSTRUCTURED:
        parser.error(f"{given}: in --sparsity_type {args.sparsity_type} all blocks are as sparse")
    if not method or not Recipe(method).observes:
        parser.error(f"{given} looks at activations, which {method or 'the dense model'} does not")
    if not ALLOCATION_SPAN <= args.sparsity_ratio <= 1 - ALLOCATION_SPAN:
        bounds = f"from {ALLOCATION_SPAN:g} to {1 - ALLOCATION_SPAN:g}"
        parser.error(f"{given}: needs a --sparsity_ratio {bounds}, not {args.sparsity_ratio:g}")


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is saved replaces a whole folder, in which nothing else may stand that is needed."""
    saved = args.save_model
    if args.eval_only and not args.replace_sparse_layers:
        parser.error(f"--save_model {saved}: --eval_only changes no weight; leave it out")
    for flag in ("save", "model", "offload", "resume"):
        value = getattr(args, flag)
        if value and Path(value).resolve().is_relative_to(Path(saved).resolve()):
            parser.error(f"--save_model {saved}: would replace --{flag} {value}; move one")
