"""The command line of main.py: its flags, what each decides, and which do not go together.

A flag decides the result unless it is listed in NO_RESULT or FIGURES: --resume, the ranks of one
job and a sweep rely on it through lib/run/fingerprint.py. This module imports neither torch nor
transformers: `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from ..methods.registry import EXPERT_METHODS, METHODS
from ..methods.sparsity import (
    ALLOCATIONS,
    EXPERTS,
    RATIO_TYPES,
    SMALLER,
    TYPES,
    UNSTRUCTURED,
    Sparsity,
)
from ..util.command import Parser

DESCRIPTION = """\
Prune a Hugging Face causal language model for one language: drop weights by what flows through
them on text of that language, measure what it cost, save a smaller model."""

# flags of which another value is no other result: they name models and texts, whose content counts
# and not their path, or say where and how fast, which is rounding at most
NO_RESULT = "model calibration_data column prune_on_c4 vocabulary_data teacher eval_data".split()
NO_RESULT += "include_path cache_dir device batch_size offload prompts save save_model".split()
NO_RESULT += ["resume", "debug"]
FIGURES = ["tasks"]  # another value is the same model, measured otherwise

FEWEST_ZEROS = 1 / 16  # packing pays for one bit per weight only above this share of zeros


def _number(kind: type, test: Callable[[Any], bool], must: str) -> Callable[[str], Any]:
    """Return a type of argparse: a number that must be what `test` says."""

    def parse(text: str) -> Any:
        if not test(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: must be {must}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: invalid int value
    return parse


POSITIVE = _number(int, lambda value: value >= 1, "at least 1")
NATURAL = _number(int, lambda value: value >= 0, "at least 0")
WINDOW = _number(int, lambda value: value >= 2, "at least 2")
SHARE = _number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
RATE = _number(float, lambda value: 0 < value < 1, "above 0 and below 1")


@cache
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of main.py."""
    parser = Parser(description=DESCRIPTION)
    group: Any = None

    def section(name: str) -> None:
        nonlocal group
        group = parser.add_argument_group(name)

    def flag(name: str, text: str, **options: Any) -> None:
        shown = options.pop("shown", options.get("default"))
        if options.get("action") != "store_true" and shown is not None:
            text += f" (default: {shown})"
        group.add_argument(f"--{name}", help=text.replace("%", "%%"), **options)

    def switch(name: str, text: str) -> None:
        flag(name, text, action="store_true")

    section("model")
    flag("model", "hub id (owner/name) or local folder", required=True)
    flag("cache_dir", "folder for weights from the hub", shown="the hub's own cache")
    flag(
        "device",
        "where blocks are computed: cuda:N, xpu:N or cpu",
        shown="the first GPU if there is one, else cpu",
    )
    flag(
        "dtype",
        "dtype of the weights while working; auto: the checkpoint's where the device multiplies it "
        "by itself (a CPU: bfloat16 with AMX or AVX-512), else float32",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    flag(
        "load_bit",
        "quantize on loading with bitsandbytes: 4 (NF4, double quantization, bfloat16 compute) or "
        "8 (LLM.int8) bits per weight",
        choices=("4", "8"),
    )
    flag(
        "seqlen",
        "length of a calibration or test window in tokens",
        type=WINDOW,
        shown="the model's limit, at most 4096",
    )
    flag(
        "bos",
        "begin every window with the BOS token; never: as published; auto: where the tokenizer "
        "adds it by itself and the dense model collapses without it",
        default="auto",
        choices=("auto", "never"),
    )
    flag(
        "batch_size",
        "windows per forward pass; changes speed and memory, and results only by rounding",
        type=POSITIVE,
        shown="windows of about 1024 tokens on a CPU, 8192 on a GPU, more for a narrow model",
    )
    flag(
        "offload",
        "for a model larger than memory: blocks are read from the checkpoint one at a time, "
        "pruned ones kept in this folder until they are saved",
        metavar="FOLDER",
    )
    switch(
        "trust_remote_code",
        "run Python code that comes with the model; only for models you trust",
    )

    section("calibration")
    flag("seed", "seed of the random draw of the windows", type=int, default=0)
    flag("nsamples", "calibration windows", type=POSITIVE, default=128)
    flag(
        "calibration_data",
        "ubertext, c4, another built-in set, a hub set (owner/name[:config][:split][:column]), or "
        "a file or folder of .jsonl, .csv, .parquet or plain text; several as SOURCE=WEIGHT make a "
        "mixture",
        nargs="+",
        metavar="SOURCE",
        shown="ubertext",
    )
    flag(
        "column",
        "column of your files and hub sets that holds the texts",
        default="text",
        metavar="NAME",
    )
    switch(
        "no_template",
        "read dialogues as plain text, not as the tokenizer's chat template renders them",
    )
    flag(
        "date",
        "the date that a chat template writes, where it asks for one",
        type=lambda text: str(date.fromisoformat(text)),
        metavar="YYYY-MM-DD",
        shown="today, or what the run was begun with that --resume continues",
    )
    switch(
        "prune_on_c4",
        "calibrate on English C4, short for --calibration_data c4; the test stays UberText",
    )

    section("vocabulary")
    switch(
        "trim_vocabulary",
        "before pruning, remove the tokens that the train text of the sources does not use, with "
        "their rows of the embedding and the head; checked on the test text before anything is "
        "saved; also without --prune_method",
    )
    flag(
        "vocabulary_data",
        "more text whose tokens stay, as for --calibration_data, without weights; of hub sets the "
        "first 100 million characters count",
        nargs="+",
        metavar="SOURCE",
        shown="the calibration sources alone",
    )

    section("pruning")
    flag(
        "prune_method",
        "how the weights to drop are chosen; of experts: reap (the mean of gate times output), "
        "contribution (its sum over all tokens), frequency, or at random",
        choices=(*METHODS, *EXPERT_METHODS),
    )
    flag(
        "sparsity_ratio",
        "share of the weights, of the MLPs' neurons or of the experts to drop, in [0, 1); N:M "
        "types need N/M",
        type=float,
        default=0.5,
    )
    flag(
        "sparsity_type",
        "anywhere; N of every M consecutive weights of a row; or whole neurons of the MLPs, or "
        "experts of a mixture, which leaves a smaller model without zeros",
        default=UNSTRUCTURED,
        choices=TYPES,
    )
    flag(
        "allocation",
        "how zeros are distributed, at an equal total; error: fewer in linears whose errors "
        "change the predictions more, by one backward pass through the model",
        default="uniform",
        choices=ALLOCATIONS,
    )
    switch("use_variant", "wanda: let each row have its own share of zeros")
    switch(
        "replace_sparse_layers",
        "swap the pruned linears, of any type, for packed ones before saving: a bit for each "
        "weight, and the kept values; where zeros are too few to be smaller they stay dense. On "
        "CUDA 2:4 in 16 bits multiplies by torch's semi-structured kernels, anything else is "
        "unpacked at each forward; a CPU (x86-64) has kernels for every pattern",
    )
    flag(
        "quantize",
        "round the linears of the blocks to 4 bits, on calibration text, and with --recover train "
        "them from there. q4_0, iq4_nl: to values that llama.cpp's type of that name holds, saved "
        "in 16 bits; iq4_nl, of the same size, loses less, has no 0 for pruned weights, and only "
        "llama.cpp and ollama run it, from what `gguf --type iq4_nl` writes; int4: to what "
        "--replace_sparse_layers packs, with a 16-bit scale for every 64 inputs of a row, and "
        "embedding and head to int8 (with --eval_only to nearest)",
        choices=("q4_0", "iq4_nl", "int4"),
    )

    section("recovery")
    flag(
        "recover",
        "after pruning, train the kept weights on this many tokens of the calibration sources' "
        "train text, with the dense model as teacher; zeros stay zeros, and with --quantize all "
        "stays on its grid; without --prune_method all weights of the blocks",
        type=POSITIVE,
        metavar="TOKENS",
    )
    flag(
        "teacher",
        "the dense model that an already pruned model was made from, for --recover to train "
        "against or --eval_only to compare with",
        metavar="MODEL",
    )
    flag(
        "recover_rank",
        "train updates of this rank of every pruned matrix, merged into it at the end, in place "
        "of all its kept weights: for a fraction of the memory",
        type=POSITIVE,
        metavar="R",
        shown="all weights",
    )
    flag(
        "recover_optimizer",
        "adamw8bit: by bitsandbytes, whose averages take 2 bytes for each trained weight, not 8; "
        "as good, slower on a CPU",
        choices=("adamw", "adamw8bit"),
        default="adamw",
    )
    flag(
        "recover_rate",
        "peak learning rate of the recovery",
        type=RATE,
        metavar="RATE",
        shown="0.6 times the root mean square of the pruned weights, over the square root of the "
        "model's width, over its blocks; a quarter of that with --quantize where nothing is pruned",
    )
    flag(
        "recover_ce",
        "share of cross-entropy with the text itself in the loss: teaches the model more of this "
        "text, and less of what the teacher knows of others, or of answering in a chat; 0: the "
        "teacher alone",
        type=SHARE,
        metavar="SHARE",
        shown="0.2; 0 where dialogues are read",
    )

    section("evaluation")
    switch("eval_only", "evaluate the model as it is; prune nothing")
    flag(
        "eval_data",
        "test texts, given as for --calibration_data; each is measured separately",
        nargs="+",
        metavar="SOURCE",
        shown="the calibration sources' own test text; of ubertext and c4, ubertext; of files "
        "without one, a tenth of the documents, which is held apart",
    )
    flag(
        "prompts",
        "beginnings of documents of each test set that the dense and the pruned model continue "
        "greedily, for results.json; none where blocks are fetched",
        type=NATURAL,
        default=3,
        metavar="N",
    )
    flag(
        "tasks",
        "tasks of lm-eval (if installed) to run on the dense and the pruned model at the end, in "
        "place of wanda's --eval_zero_shot",
        type=lambda names: names.split(","),
        metavar="NAME,...",
    )
    flag(
        "include_path",
        "folder of your own tasks for --tasks, as YAML files that lm-eval reads; their data may "
        "be local files",
        metavar="FOLDER",
    )

    section("output")
    flag(
        "save",
        "folder for log_METHOD.txt and results.json",
        metavar="FOLDER",
        shown="out/MODEL-METHOD-TYPE-RATIO",
    )
    flag("save_model", "new folder for the pruned model, tokenizer and card", metavar="FOLDER")
    flag(
        "resume",
        "keep pruned blocks and the state of the recovery in this folder, so that the same command "
        "continues after an interruption; removed after success",
        metavar="FOLDER",
    )
    switch("text_only", "of a model that also sees or hears, save the text alone")
    switch("debug", "show the full traceback of an error")
    return parser


def given(args: argparse.Namespace, name: str) -> bool:
    """Return whether a flag has another value than its default."""
    return getattr(args, name) != build_parser().get_default(name)


def shown(args: argparse.Namespace, name: str) -> str:
    """Return the flag as the user gave it."""
    value = getattr(args, name)
    if value is True:
        return f"--{name}"
    if isinstance(value, list):
        value = ("," if name == "tasks" else " ").join(value)
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit through parser.error (status 2) if flags contradict each other or have no effect."""
    for mistake in mistakes(args):
        parser.error(mistake)


NEEDS = {  # a flag: others of which one must be given
    "vocabulary_data": ("trim_vocabulary",),
    "teacher": ("recover", "eval_only"),
    "recover_rank": ("recover",),
    "recover_optimizer": ("recover",),
    "recover_rate": ("recover",),
    "recover_ce": ("recover",),
    "include_path": ("tasks",),
    "allocation": ("prune_method",),
    "text_only": ("save_model",),
}
EXCLUDES = (  # two flags, and why not both
    ("offload", "load_bit", "blocks can't be quantized on their way from disk"),
    ("text_only", "load_bit", "its parts are quantized as one"),
    ("prune_on_c4", "calibration_data", "is short for --calibration_data c4"),
    ("replace_sparse_layers", "load_bit", "quantized weights can't be packed"),
    ("quantize", "load_bit", "weights are quantized once"),
    ("recover", "eval_only", "--eval_only changes no weight"),
    ("recover", "load_bit", "quantized weights can't be trained"),
    ("recover", "offload", "blocks on disk can't be trained"),
    ("teacher", "offload", "the teacher is held in memory whole"),
    ("teacher", "prune_method", "the model itself, before it is pruned, is the teacher"),
    ("eval_only", "prune_method", "prunes nothing"),
)


def mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield what is wrong with the flags, a line each: flag, value and the way out."""
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):
            yield f"--{name} '': is empty; give a value, or leave the flag out"
    for one, other, reason in EXCLUDES:
        if given(args, one) and given(args, other):
            yield f"{shown(args, one)}: {reason}; leave out {shown(args, other)}"
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except ValueError as error:
        yield str(error)
    for name, needed in NEEDS.items():
        if given(args, name) and not any(given(args, other) for other in needed):
            names = " or ".join(f"--{other}" for other in needed)
            yield f"{shown(args, name)}: is for {names}, which is not given"
    method, kind, ratio = args.prune_method, args.sparsity_type, args.sparsity_ratio
    packs, form = args.replace_sparse_layers, shown(args, "quantize")
    if args.quantize == "int4" and not packs:
        yield f"{form}: is for --replace_sparse_layers, which is not given"
    in_llama_cpp = args.quantize and args.quantize != "int4"
    if in_llama_cpp and packs:
        yield f"{form}: llama.cpp runs no packed weights; leave out --replace_sparse_layers"
    if in_llama_cpp and args.eval_only:
        yield f"{form}: --eval_only changes no weight; leave out --eval_only"
    has_text = args.calibration_data or args.prune_on_c4
    rounds = args.quantize and (has_text or not packs)
    if not (method or args.eval_only or args.recover or args.trim_vocabulary or rounds):
        yield f"--prune_method: name one of {', '.join(METHODS)}, or give --eval_only"
    if args.use_variant and method != "wanda":
        yield f"--use_variant: is for wanda, not for {method or 'the dense model'}"
    for name in ("use_variant", "allocation") if kind != UNSTRUCTURED else ():
        if given(args, name):
            yield f"{shown(args, name)}: is for --sparsity_type {UNSTRUCTURED}, not for {kind}"
    if method and (kind == EXPERTS) != (method in EXPERT_METHODS):
        names = ", ".join(EXPERT_METHODS if kind == EXPERTS else METHODS)
        yield f"--prune_method {method}: is not for --sparsity_type {kind}; use one of {names}"
    if method and kind in SMALLER:
        smaller = f"--sparsity_type {kind}"
        if ratio == 0:
            yield f"--sparsity_ratio 0: with {smaller} nothing would go"
        if args.load_bit:
            yield f"{smaller}: quantized weights can't be cut; leave out --load_bit {args.load_bit}"
        if packs:
            yield f"{smaller}: leaves no zeros for --replace_sparse_layers; leave that out"
    if method and kind == UNSTRUCTURED:
        if args.recover and ratio == 0:
            yield f"{shown(args, 'recover')}: with --sparsity_ratio 0 there is nothing to recover"
        if packs and ratio <= FEWEST_ZEROS:
            yield (
                f"--replace_sparse_layers: with --sparsity_ratio {ratio:g} nothing is smaller "
                f"packed; give more than {FEWEST_ZEROS:g}, or leave it out"
            )
    if args.save_model:
        target, saved = Path(args.save_model).resolve(), shown(args, "save_model")
        if args.eval_only and not (packs or args.trim_vocabulary or args.text_only):
            yield f"{saved}: --eval_only changes no weight; leave it out"
        for name in ("save", "model", "offload", "resume", "teacher"):
            value = getattr(args, name)
            if value and Path(value).resolve().is_relative_to(target):
                yield f"{saved}: must be a new folder, but --{name} {value} is in it"


def default_save(args: argparse.Namespace) -> str:
    """Return the folder of the results where --save is not given."""
    model = Path(args.model).name or "model"
    if not args.prune_method:
        return f"out/{model}-{'recovered' if args.recover else args.quantize or 'dense'}"
    share = f"{args.sparsity_ratio:g}" if args.sparsity_type in RATIO_TYPES else ""
    parts = [model, args.prune_method, args.sparsity_type.replace(":", "of"), share]
    return "out/" + "-".join(part for part in parts if part)
