"""The command line: every flag, what it is for the run, and what flags alone can get wrong.

A flag's role is the one place that says whether another value makes another result. An interrupted
run that goes on, the processes of one job and a sweep that skips what is finished all ask it, by
way of lib/run/fingerprint.py. Imports neither torch nor transformers: `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.methods.registry import METHODS, MethodSpec
from lib.methods.sparsity import ALLOCATION_SPAN, ALLOCATIONS, TYPES, UNSTRUCTURED, Sparsity
from lib.util.command import Parser, add_debug_flag

DESCRIPTION = """\
Prune a Hugging Face causal language model for one language: drop weights by what flows through
them on text of that language, measure what it cost, save a smaller model."""


RESULT = "result"  # another value is another result
INPUT = "input"  # names a model or texts: what is found there decides, not where it is
SHOWN = "shown"  # what more is told of a result; no weight and no figure depends on it
SPEED = "speed"  # nothing but time and memory, up to rounding
PLACE = "place"  # where something is computed or kept

FEWEST_ZEROS = 1 / 16  # of 16-bit weights: as much as the packed form's bit for each weight takes

# flags whose values a run's results hold in fields of their own
TOLD = "seed prune_method sparsity_type sparsity_ratio use_variant eval_only tasks".split()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        vocabulary_sources = "default:" in (action.help or "") or action.default in (None, False)
        return action.help if vocabulary_sources else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py; the only place where a default stands."""
    parser = Parser(
        description=DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _model_flags(parser.add_argument_group("model"))
    _calibration_flags(parser.add_argument_group("calibration"))
    _vocabulary_flags(parser.add_argument_group("vocabulary"))
    _pruning_flags(parser.add_argument_group("pruning"))
    _recovery_flags(parser.add_argument_group("recovery"))
    _evaluation_flags(parser.add_argument_group("evaluation"))
    _output_flags(parser.add_argument_group("output"))
    return parser


def flag(group: argparse._ArgumentGroup, role: str, name: str, **options: Any) -> None:
    """Declare a flag with its role for the run."""
    _mark(group.add_argument(name, **options), role, group)


def _mark(action: argparse.Action, role: str, group: argparse._ArgumentGroup) -> None:
    action.role, action.group = role, group.title


def roles() -> dict[str, tuple[str, str]]:
    """{flag: (role, group)} of every flag, in the order of `--help`, without dashes."""
    actions = (a for a in build_parser()._actions if a.dest != "help")
    return {action.dest: (action.role, action.group) for action in actions}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that change the result, as far as no other field of the results tells them.

    Of the dense model only those count that it is read with, or trimmed.
    """
    dense = args.prune_method is None and args.recover is None
    return {
        name: getattr(args, name)
        for name, (role, group) in roles().items()
        if role == RESULT and name not in TOLD and (group in ("model", "vocabulary") or not dense)
    }


def _model_flags(group) -> None:
    flag(group, INPUT, "--model", required=True, help="hub id (owner/name) or local folder")
    flag(group, PLACE, "--cache_dir", default="llm_weights", help="folder for weights from the hub")
    flag(
        group, PLACE, "--device", default="cuda:0", help="where blocks are computed: cuda:N, or cpu"
    )
    flag(
        group,
        RESULT,
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights while working; auto: the checkpoint's on CUDA, float32 on CPU",
    )
    flag(
        group,
        RESULT,
        "--load_bit",
        choices=("4", "8"),
        help="quantise on loading, by bitsandbytes: 4 (NF4, double quantisation, bfloat16 "
        "compute) or 8 (LLM.int8) bits per weight",
    )
    flag(
        group,
        RESULT,
        "--seqlen",
        type=int,
        help="window in tokens, of calibration and test (default: the model's limit, at most 4096)",
    )
    flag(
        group,
        RESULT,
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="begin every window with the BOS token; never: as published; auto: where the "
        "tokenizer adds it by itself and the dense model collapses without it",
    )
    flag(
        group,
        SPEED,
        "--batch_size",
        type=int,
        help="windows per forward pass; changes speed and memory, not results beyond rounding "
        "(default: about 1024 tokens' worth on a CPU, 8192 on CUDA and more of a narrow model)",
    )
    flag(
        group,
        SPEED,
        "--timeout",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="of several processes: how long one waits for another without a sign of it",
    )
    flag(
        group,
        PLACE,
        "--offload",
        metavar="FOLDER",
        help="for a model larger than memory: blocks are read from the checkpoint one at a time, "
        "pruned ones kept in this folder until they are saved",
    )
    flag(
        group,
        RESULT,
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with the model; only for models you trust",
    )


def _calibration_flags(group) -> None:
    flag(group, RESULT, "--seed", type=int, default=0, help="draws the calibration windows")
    flag(group, RESULT, "--nsamples", type=int, default=128, help="calibration windows")
    flag(
        group,
        INPUT,
        "--calibration_data",
        nargs="+",
        metavar="SOURCE",
        help="ubertext, c4, another built-in set, a hub set (owner/name[:config][:split][:column]),"
        " a folder with train*.jsonl[.gz] (rows with `text`), or a file; several as SOURCE=WEIGHT "
        "make a mixture (default: ubertext)",
    )
    flag(
        group,
        INPUT,
        "--prune_on_c4",
        action="store_true",
        help="calibrate on English C4, short for --calibration_data c4; the test stays UberText",
    )


def _vocabulary_flags(group) -> None:
    flag(
        group,
        RESULT,
        "--trim_vocabulary",
        action="store_true",
        help="first of all drop the tokens that the train text of the sources does not use, with "
        "their rows of the embedding and the head; proven on the test text before anything is "
        "saved; also without --prune_method",
    )
    flag(
        group,
        INPUT,
        "--vocabulary_data",
        nargs="+",
        metavar="SOURCE",
        help="more text whose tokens stay, as for --calibration_data, without weights; of hub sets "
        "the first 100 million characters count (default: the calibration sources alone)",
    )
    flag(
        group,
        RESULT,
        "--vocabulary_size",
        type=int,
        metavar="N",
        help="keep at most so many tokens, the most frequent ones (default: all that are used, "
        "filled up to a multiple of 64)",
    )
    flag(
        group,
        RESULT,
        "--vocabulary_minimum",
        type=int,
        metavar="COUNT",
        help="drop also what occurs less often than this (default: 1, all that is used stays)",
    )


def _pruning_flags(group) -> None:
    flag(
        group,
        RESULT,
        "--prune_method",
        choices=tuple(METHODS),
        help="how the weights to drop are chosen",
    )
    flag(
        group,
        RESULT,
        "--sparsity_ratio",
        type=float,
        default=0.5,
        help="share of the weights to drop, in [0, 1); N:M types need N/M",
    )
    flag(
        group,
        RESULT,
        "--sparsity_type",
        choices=TYPES,
        default=UNSTRUCTURED,
        help="anywhere, or N of every M consecutive weights of a row",
    )
    flag(
        group,
        RESULT,
        "--allocation",
        choices=ALLOCATIONS,
        default="uniform",
        help="of the zeros, at an equal total, unstructured only; owl: fewer in blocks whose "
        "activations have more outliers; error: fewer in linears whose errors change the "
        "predictions more, by one way back through the model",
    )
    flag(
        group,
        RESULT,
        "--use_variant",
        action="store_true",
        help="wanda only: rows get shares of zeros of their own, unstructured",
    )
    flag(
        group,
        RESULT,
        "--blend",
        type=float,
        metavar="A",
        help="admm only: how much of what earlier linears broke each one repairs (default: 1, all)",
    )
    flag(
        group,
        RESULT,
        "--replace_sparse_layers",
        action="store_true",
        help="swap the pruned linears, of any type, for packed ones before evaluation and saving: "
        "a bit for each weight, and the kept values; where zeros are too few for that to be "
        "smaller they stay dense",
    )
    flag(
        group,
        RESULT,
        "--pack_bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="with --replace_sparse_layers: 16 keeps the kept values as they are saved anyway, in "
        "the dtype of the checkpoint (float32 ones stay float32, at 32 bits) or --dtype; 8 rounds "
        "them to int8, with a float32 scale for each row",
    )


def _recovery_flags(group) -> None:
    flag(
        group,
        RESULT,
        "--recover",
        type=int,
        metavar="TOKENS",
        help="after pruning, train the kept weights on so many tokens of the calibration sources' "
        "train text, the dense model as teacher; zeros stay zeros (default: no recovery)",
    )
    flag(
        group,
        INPUT,
        "--teacher",
        metavar="MODEL",
        help="to recover a model that was pruned before, without --prune_method: the dense model "
        "that it was made of",
    )
    flag(
        group,
        RESULT,
        "--recover_rank",
        type=int,
        metavar="R",
        help="train updates of this rank of every pruned matrix, merged into it at the end, in "
        "place of all its kept weights: for a fraction of the memory (default: all weights)",
    )
    flag(
        group,
        RESULT,
        "--recover_rate",
        type=float,
        metavar="RATE",
        help="peak learning rate of the recovery (default: 0.6 times the root mean square of the "
        "pruned weights, over the square root of the model's width, over its blocks)",
    )
    flag(
        group,
        RESULT,
        "--recover_ce",
        type=float,
        metavar="SHARE",
        help="share of cross-entropy with the text itself in the loss, in [0, 1): teaches the "
        "model more of this text, and less of what the teacher knows of others, or of answering in "
        "a chat; 0: the teacher alone (default: 0.2)",
    )


def _evaluation_flags(group) -> None:
    flag(
        group,
        RESULT,
        "--eval_only",
        action="store_true",
        help="perplexity of the model as it is; prune nothing",
    )
    flag(
        group,
        INPUT,
        "--eval_data",
        nargs="+",
        metavar="SOURCE",
        help="test texts, as for --calibration_data, each measured by itself (default: the "
        "calibration folder where it has a test*.jsonl, else ubertext)",
    )
    flag(
        group,
        SHOWN,
        "--prompts",
        type=int,
        default=3,
        metavar="N",
        help="beginnings of documents of each test set that the dense and the pruned model "
        "continue greedily, for results.json, card and report; 0 for none, and none where blocks "
        "are fetched",
    )
    flag(
        group,
        RESULT,
        "--tasks",
        metavar="NAME,...",
        type=lambda text: [name for name in text.split(",") if name],
        help="tasks of lm-eval (if installed) to run on the model after perplexity",
    )


def _output_flags(group) -> None:
    flag(group, PLACE, "--save", default="out", help="folder for log_METHOD.txt and results.json")
    flag(group, PLACE, "--save_model", help="folder for the pruned model, tokenizer and card")
    flag(
        group,
        SHOWN,
        "--card_without_prompts",
        action="store_true",
        help="leave the beginnings of test documents and their completions out of the card, which "
        "may be published",
    )
    flag(
        group,
        PLACE,
        "--resume",
        metavar="FOLDER",
        help="keep each pruned block, and where the recovery stands, in this folder, so that the "
        "same command goes on after an interruption; removed after success",
    )
    _mark(add_debug_flag(group), PLACE, group)


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave through parser.error (status 2) where flags contradict each other or make no sense."""
    for flag, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):
            parser.error(f"--{flag} '': is empty; give a value, or leave the flag out")
    for flag in ("nsamples", "batch_size", "seqlen"):
        value, least = getattr(args, flag), 2 if flag == "seqlen" else 1
        if value is not None and value < least:
            parser.error(f"--{flag} {value}: must be at least {least}")
    if args.prompts < 0:
        parser.error(f"--prompts {args.prompts}: must be a number of documents, or 0 for none")
    if not args.timeout > 0:  # also refuses nan
        parser.error(f"--timeout {args.timeout:g}: must be above 0")
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except ValueError as error:
        parser.error(str(error))
    method, kind = args.prune_method, args.sparsity_type
    _check_recovery(parser, args)
    _check_vocabulary(parser, args)
    if not (method or args.eval_only or args.recover or args.trim_vocabulary):
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
    _check_packing(parser, args)
    if args.load_bit and args.offload:
        parser.error(
            f"--offload {args.offload}: blocks can't be quantised on their way from disk; "
            f"leave out --load_bit {args.load_bit}"
        )
    if args.prune_on_c4 and args.calibration_data:
        parser.error("--prune_on_c4 is short for --calibration_data c4; give only one of them")
    if args.save_model:
        _check_outputs(parser, args)


def _check_packing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What can be packed, and whether it will be smaller."""
    if not args.replace_sparse_layers:
        if args.pack_bits != 16:
            parser.error(f"--pack_bits {args.pack_bits}: is for --replace_sparse_layers; give both")
        return
    if args.load_bit:
        parser.error("--replace_sparse_layers can't be combined with --load_bit; leave out one")
    ratio, pruned = args.sparsity_ratio, args.prune_method
    if pruned and args.sparsity_type == UNSTRUCTURED and ratio <= FEWEST_ZEROS:
        parser.error(
            f"--replace_sparse_layers: with --sparsity_ratio {ratio:g} nothing is smaller packed; "
            f"give more than {FEWEST_ZEROS:g}, or leave it out"
        )


def _check_vocabulary(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is said of a vocabulary that is trimmed."""
    for flag in ("vocabulary_data", "vocabulary_size", "vocabulary_minimum"):
        value = getattr(args, flag)
        if value is not None and not args.trim_vocabulary:
            told = " ".join(value) if isinstance(value, list) else value
            parser.error(f"--{flag} {told}: is for --trim_vocabulary, which is not given")
        if isinstance(value, int) and value < 1:
            parser.error(f"--{flag} {value}: must be at least 1")


def _check_allocation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What differs between blocks follows activations; OWL needs room on both sides."""
    method, given = args.prune_method, f"--allocation {args.allocation}"
    if args.allocation == "uniform":
        return
    if args.sparsity_type != UNSTRUCTURED:
        parser.error(f"{given}: in --sparsity_type {args.sparsity_type} all blocks are as sparse")
    if not method or args.allocation == "owl" and not MethodSpec(method).cls.observes:
        parser.error(f"{given} looks at activations, which {method or 'the dense model'} does not")
    fits = ALLOCATION_SPAN <= args.sparsity_ratio <= 1 - ALLOCATION_SPAN
    if args.allocation == "owl" and not fits:
        bounds = f"from {ALLOCATION_SPAN:g} to {1 - ALLOCATION_SPAN:g}"
        parser.error(f"{given}: needs a --sparsity_ratio {bounds}, not {args.sparsity_ratio:g}")


def _check_recovery(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What can be trained, and on what terms."""
    tokens, method = args.recover, args.prune_method
    if tokens is None:
        for flag in ("teacher", "recover_rank", "recover_rate", "recover_ce"):
            if (value := getattr(args, flag)) is not None:
                parser.error(f"--{flag} {value}: is for --recover TOKENS, which is not given")
        return
    given = f"--recover {tokens}"
    if tokens < 1:
        parser.error(f"{given}: must be a number of tokens above 0; leave it out to train nothing")
    if args.eval_only:
        parser.error(f"{given}: --eval_only changes no weight; leave out one of them")
    if not method and not args.teacher:
        parser.error(
            f"{given}: give --prune_method, or for a model that was pruned before --teacher MODEL, "
            "the dense model that it was made of"
        )
    if method and args.teacher:
        parser.error(
            f"--teacher {args.teacher}: with --prune_method {method} the model itself, before it "
            "is pruned, is the teacher; leave out one of them"
        )
    if method and args.sparsity_type == UNSTRUCTURED and args.sparsity_ratio == 0:
        parser.error(f"{given}: with --sparsity_ratio 0 there is nothing to recover")
    for flag in ("load_bit", "offload"):
        if value := getattr(args, flag):
            what = "quantised weights" if flag == "load_bit" else "blocks on disk"
            parser.error(f"{given}: {what} can't be trained; leave out --{flag} {value}")
    if args.recover_rank is not None and args.recover_rank < 1:
        parser.error(f"--recover_rank {args.recover_rank}: must be at least 1")
    if args.recover_ce is not None and not 0 <= args.recover_ce < 1:  # also refuses nan
        parser.error(f"--recover_ce {args.recover_ce:g}: must be from 0 to below 1")
    rate = args.recover_rate
    if rate is not None and not 0 < rate < 1:  # also refuses nan
        parser.error(f"--recover_rate {rate:g}: must be above 0 and below 1")
    if args.replace_sparse_layers and not method:
        parser.error(
            f"{given}: what was pruned before is packed by a second run, with --eval_only and "
            "--replace_sparse_layers"
        )


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is saved replaces a whole folder, in which nothing else may stand that is needed."""
    saved = args.save_model
    if args.eval_only and not args.replace_sparse_layers and not args.trim_vocabulary:
        parser.error(f"--save_model {saved}: --eval_only changes no weight; leave it out")
    for flag in ("save", "model", "offload", "resume", "teacher"):
        value = getattr(args, flag)
        if value and Path(value).resolve().is_relative_to(Path(saved).resolve()):
            parser.error(f"--save_model {saved}: would replace --{flag} {value}; move one")
