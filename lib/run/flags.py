"""The command line of main.py: its flags, and which of them contradict each other.

A flag decides the result unless it is listed in NO_RESULT or FIGURES: --resume, the ranks of one
job and a sweep rely on this through lib/run/fingerprint.py. This module imports neither torch nor
transformers, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from ..methods.registry import EXPERT_METHODS, METHODS, is_file
from ..methods.sparsity import (
    ALLOCATIONS,
    EXPERTS,
    SMALLER,
    TYPES,
    UNSTRUCTURED,
    Sparsity,
)
from ..util.command import typed
from .plan import FlagParser, packed

DESCRIPTION = """\
Prune and quantize a Hugging Face causal language model for one language, with text in that
language. Report the loss in quality, and save the smaller model."""
EXAMPLES = """\
examples:
  the published run, calibrated and tested on Ukrainian UberText:
    {0} --model MODEL --prune_method sparsegpt --nsamples 64
  most accurate pruning, then training with the dense model as teacher:
    {0} --model MODEL --prune_method admm --allocation error --calibration_data TEXTS \\
        --recover 500000 --save_model OUT
  4 bits for llama.cpp, with the vocabulary of the texts:
    {0} --model MODEL --trim_vocabulary --quantize q4_0 --calibration_data TEXTS --save_model OUT
"""

# flags left out of the fingerprint: models and texts are hashed by content, and device or batch
# size change results only by rounding
NO_RESULT = "model calibration_data column prune_on_c4 vocabulary_data teacher eval_data".split()
NO_RESULT += (
    "include_path cache_dir device batch_size offload_folder completions save save_model".split()
)
NO_RESULT += ["resume", "debug", "save_masks"]
FIGURES = ["tasks", "eval_windows"]  # flags that change the evaluation, not the model

FEWEST_ZEROS = 1 / 16  # packing pays for one bit per weight only above this share of zeros


def _number(kind: type, test: Callable[[Any], bool], must: str) -> Callable[[str], Any]:
    """Return a type of argparse: a number that passes `test`."""

    def parse(text: str) -> Any:
        if not test(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: must be {must}")
        return value

    parse.__name__ = kind.__name__  # shown by argparse: invalid int value
    return parse


POSITIVE = _number(int, lambda value: value >= 1, "at least 1")
NATURAL = _number(int, lambda value: value >= 0, "at least 0")
WINDOW = _number(int, lambda value: value >= 2, "at least 2")
SHARE = _number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
RATE = _number(float, lambda value: 0 < value < 1, "above 0 and below 1")


def _one_of(names: tuple[str, ...], ends: str, more: str) -> Callable[[str], str]:
    """Return a type of argparse: one of `names`, or a text that contains `ends`."""

    def parse(text: str) -> str:
        if text not in names and ends not in text:
            raise argparse.ArgumentTypeError(f"{text}: must be {', '.join(names)} or {more}")
        return text

    return parse


METHOD = _one_of((*METHODS, *EXPERT_METHODS), ".py:", "FILE.py:CLASS")


@cache
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of main.py."""
    parser = FlagParser(
        description=DESCRIPTION,
        usage="%(prog)s --model MODEL [options]",
        epilog=EXAMPLES.format(typed("prune")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    flag("model", "Hub id (owner/name) or local folder", required=True)
    flag("cache_dir", "folder for weights from the Hub", metavar="FOLDER", shown="the Hub's cache")
    flag(
        "load_bit",
        "quantize on loading with bitsandbytes: 4 (NF4) or 8 (LLM.int8) bits per weight",
        choices=("4", "8"),
    )
    switch("text_only", "save without vision and audio parts; requires --save_model")
    switch("trust_remote_code", "run Python code that comes with the model, if you trust it")

    section("data")
    flag(
        "calibration_data",
        "ubertext, c4, a Hub dataset, a file or a folder; SOURCE=WEIGHT mixes several",
        nargs="+",
        metavar="SOURCE",
        shown="ubertext",
    )
    switch("prune_on_c4", "calibrate on English C4; the test text stays UberText")
    flag("nsamples", "number of calibration windows", type=POSITIVE, default=128, metavar="N")
    flag("seed", "seed of the random draw of the windows", type=int, default=0)
    flag(
        "seqlen",
        "tokens per calibration or test window",
        type=WINDOW,
        metavar="TOKENS",
        shown="the model's limit, at most 4096",
    )
    flag("column", "column that holds the texts", default="text", metavar="NAME")
    flag(
        "bos",
        "start windows with BOS; auto: if the dense model needs it; never: as published",
        default="auto",
        choices=("auto", "never"),
    )
    switch("no_chat_template", "read dialogues as plain text, without the chat template")
    flag(
        "date",
        "date for chat templates that write one",
        type=lambda text: str(date.fromisoformat(text)),
        metavar="YYYY-MM-DD",
        shown="today, or that of the resumed run",
    )

    section("pruning")
    flag(
        "prune_method",
        f"one of {', '.join(METHODS)}; for experts {', '.join(EXPERT_METHODS)}; or FILE.py:CLASS",
        type=METHOD,
        metavar="METHOD",
    )
    flag(
        "sparsity_ratio",
        "share of weights, neurons or experts to prune, at least 0 and below 1; N:M requires N/M",
        type=float,
        default=0.5,
        metavar="SHARE",
    )
    flag(
        "sparsity_type",
        "unstructured: any weights; N:M: N of every M; neurons, experts: remove whole ones",
        default=UNSTRUCTURED,
        choices=TYPES,
    )
    switch("use_variant", "Wanda's variant, a share of zeros per row; requires wanda")
    flag(
        "method_args",
        "parameters of the method, such as alpha=0.5 for ria; requires --prune_method",
        nargs="+",
        metavar="NAME=VALUE",
    )
    flag(
        "allocation",
        "sparsity per layer: uniform; error: by effect on outputs; owl: by outliers; or FILE.json",
        default="uniform",
        type=_one_of(ALLOCATIONS, ".json", "FILE.json"),
        metavar="RULE",
    )

    section("quantization and packing")
    flag(
        "quantize",
        "4 bits with calibration text; q4_0: every engine; iq4_nl: only llama.cpp; int4: packed",
        choices=("q4_0", "iq4_nl", "int4"),
    )
    switch(
        "replace_sparse_layers",
        "save sparse layers packed; fast as 2:4 on CUDA (torch's kernels) and in any pattern on "
        "x86-64 CPUs",
    )

    section("vocabulary")
    switch("trim_vocabulary", "remove tokens that the training text does not use")
    flag(
        "vocabulary_data",
        "more text whose tokens are kept; requires --trim_vocabulary",
        nargs="+",
        metavar="SOURCE",
    )

    section("recovery training")
    flag(
        "recover",
        "train on this many tokens, with the dense model as teacher; sparsity and 4 bits stay",
        type=POSITIVE,
        metavar="TOKENS",
    )
    flag(
        "teacher",
        "dense model that MODEL was made from; requires --recover or --eval_only",
        metavar="MODEL",
    )
    flag(
        "recover_rank",
        "train low-rank updates (as LoRA, merged at the end); requires --recover",
        type=POSITIVE,
        metavar="R",
        shown="all weights",
    )
    flag(
        "recover_optimizer",
        "adamw8bit saves 6 bytes of memory per weight, and is slower on a CPU; requires --recover",
        choices=("adamw", "adamw8bit"),
        default="adamw",
    )
    flag(
        "recover_lr",
        "peak learning rate; requires --recover",
        type=RATE,
        metavar="RATE",
        shown="by the model's weights and size, see docs/recovery.md",
    )
    flag(
        "recover_ce_weight",
        "weight of cross-entropy with the text in the loss, 0: teacher only; requires --recover",
        type=SHARE,
        metavar="SHARE",
        shown="0.2; 0 for dialogues",
    )

    section("evaluation")
    switch("eval_only", "evaluate the model without pruning, quantizing to q4_0 or training it")
    flag(
        "eval_data",
        "test texts, in the form of --calibration_data; each is measured separately",
        nargs="+",
        metavar="SOURCE",
        shown="the test text of the data, or a held-out tenth",
    )
    flag(
        "eval_windows",
        "number of windows per test text, evenly over its documents",
        type=POSITIVE,
        metavar="N",
        shown="all",
    )
    flag(
        "completions",
        "prompts per test text that both models complete, for results.json",
        type=NATURAL,
        default=3,
        metavar="N",
    )
    flag(
        "tasks",
        "tasks of lm-eval to run at the end (Wanda: --eval_zero_shot); requires lm-eval",
        type=lambda names: names.split(","),
        metavar="NAME,...",
    )
    flag("include_path", "folder of your own lm-eval tasks; requires --tasks", metavar="FOLDER")

    section("output")
    flag(
        "save",
        "folder for results.json and log_METHOD.txt",
        metavar="FOLDER",
        shown="out/MODEL-METHOD-TYPE-RATIO",
    )
    flag("save_model", "new folder for the model, tokenizer and model card", metavar="FOLDER")
    flag("save_masks", "new safetensors file for masks; requires --prune_method", metavar="FILE")

    section("execution")
    flag(
        "device",
        "cuda:N, xpu:N or cpu",
        shown="the first GPU, else cpu",
    )
    flag(
        "dtype",
        "compute dtype; auto: the checkpoint's if the device supports it natively, else float32",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    flag(
        "batch_size",
        "windows per forward pass; results differ only by rounding",
        type=POSITIVE,
        metavar="N",
        shown="by the device and the model's width",
    )
    flag(
        "offload_folder",
        "read blocks one at a time, and keep changed ones in this folder until they are saved",
        metavar="FOLDER",
    )
    flag(
        "resume",
        "folder for the state of the run; the same command continues it, and success removes it",
        metavar="FOLDER",
    )
    switch("debug", "show the full traceback of an error")
    return parser


def given(args: argparse.Namespace, name: str) -> bool:
    """Return whether a flag differs from its default."""
    return getattr(args, name) != build_parser().get_default(name)


def shown(args: argparse.Namespace, name: str) -> str:
    """Return the flag as the user gave it."""
    value = getattr(args, name)
    if value is True:
        return f"--{name}"
    if isinstance(value, list):
        value = ("," if name == "tasks" else " ").join(value)
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def command_words(flags: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with these flags, without defaults."""
    words = typed("prune").split()
    for name, value in flags.items():
        if value is None or value is False or value == build_parser().get_default(name):
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        values = [",".join(values)] if name == "tasks" else values
        words += [f"--{name}", *map(str, values)]
    return words


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit through parser.error (status 2) if flags contradict each other or have no effect."""
    for mistake in mistakes(args):
        parser.error(mistake)


NEEDS = {  # {flag: flags of which one is required}
    "vocabulary_data": ("trim_vocabulary",),
    "teacher": ("recover", "eval_only"),
    "recover_rank": ("recover",),
    "recover_optimizer": ("recover",),
    "recover_lr": ("recover",),
    "recover_ce_weight": ("recover",),
    "include_path": ("tasks",),
    "allocation": ("prune_method",),
    "method_args": ("prune_method",),
    "save_masks": ("prune_method",),
    "text_only": ("save_model",),
}
EXCLUDES = (  # two flags, and why they exclude each other
    ("offload_folder", "load_bit", "blocks cannot be quantized while they are read from disk"),
    ("text_only", "load_bit", "parts of a quantized model cannot be removed"),
    ("prune_on_c4", "calibration_data", "it is short for --calibration_data c4"),
    ("replace_sparse_layers", "load_bit", "quantized weights cannot be packed"),
    ("quantize", "load_bit", "weights can be quantized only once"),
    ("recover", "eval_only", "--eval_only trains nothing"),
    ("recover", "load_bit", "quantized weights cannot be trained"),
    ("recover", "offload_folder", "blocks on disk cannot be trained"),
    ("teacher", "offload_folder", "the whole teacher must be in memory"),
    ("teacher", "prune_method", "the model before pruning is its teacher"),
    ("eval_only", "prune_method", "it prunes nothing"),
)


def mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each mistake in the flags: flag, value, problem and fix."""
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):
            yield f"--{name} '': the value is empty. Give one, or leave the flag out."
    for one, other, reason in EXCLUDES:
        if given(args, one) and given(args, other):
            yield f"{shown(args, one)}: {reason}. Leave out {shown(args, other)}."
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except ValueError as error:
        yield str(error)
    for name, needed in NEEDS.items():
        if given(args, name) and not any(given(args, other) for other in needed):
            names = " or ".join(f"--{other}" for other in needed)
            yield f"{shown(args, name)}: it requires {names}. Add it, or leave the flag out."
    yield from _pruning_mistakes(args)
    if args.save_model:
        target, saved = Path(args.save_model).resolve(), shown(args, "save_model")
        if args.eval_only and not (packed(vars(args)) or args.trim_vocabulary or args.text_only):
            yield f"{saved}: --eval_only leaves the model unchanged. Leave out one of them."
        for name in ("save", "model", "offload_folder", "resume", "teacher"):
            value = getattr(args, name)
            if value and Path(value).resolve().is_relative_to(target):
                yield f"{saved}: --{name} {value} is inside this folder. Name a new folder."


def _pruning_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each mistake in the flags of pruning, quantization and packing."""
    method, kind, ratio = args.prune_method, args.sparsity_type, args.sparsity_ratio
    packs, form = packed(vars(args)), shown(args, "quantize")
    in_llama_cpp = args.quantize and args.quantize != "int4"
    if in_llama_cpp and packs:
        yield f"{form}: llama.cpp cannot read packed weights. Leave out --replace_sparse_layers."
    if in_llama_cpp and args.eval_only:
        yield f"{form}: --eval_only does not quantize for llama.cpp. Leave out --eval_only."
    has_text = args.calibration_data or args.prune_on_c4
    rounds = args.quantize and (has_text or not packs)
    if not (method or args.eval_only or args.recover or args.trim_vocabulary or rounds):
        yield f"--prune_method: none is given. Use {', '.join(METHODS)}, or give --eval_only."
    if args.use_variant and method != "wanda":
        yield f"--use_variant: it requires wanda, not {method or 'no method'}. Leave the flag out."
    everywhere = kind in SMALLER or args.allocation == "error"
    fixed = everywhere or (args.allocation == "owl" and kind == "2:4")  # excludes patterns
    for name in ("use_variant", *["allocation"] * fixed) if kind != UNSTRUCTURED else ():
        if given(args, name):
            yield f"{shown(args, name)}: {kind} excludes it. Use --sparsity_type {UNSTRUCTURED}."
    if args.save_masks and kind in SMALLER:
        yield f"{shown(args, 'save_masks')}: --sparsity_type {kind} leaves no zeros. Leave it out."
    if method and not is_file(method) and (kind == EXPERTS) != (method in EXPERT_METHODS):
        names = ", ".join(EXPERT_METHODS if kind == EXPERTS else METHODS)
        yield f"--prune_method {method}: it does not support {kind}. Use one of {names}."
    if method and kind in SMALLER:
        smaller = f"--sparsity_type {kind}"
        if ratio == 0:
            yield f"--sparsity_ratio 0: it removes nothing with {smaller}. Use a value above 0."
        if args.load_bit:
            yield f"{smaller}: quantized weights stay whole. Leave out --load_bit {args.load_bit}."
        if packs:
            yield f"{smaller}: it leaves nothing to pack. Leave out --replace_sparse_layers."
    if method and kind == UNSTRUCTURED:
        if args.recover and ratio == 0:
            yield f"--recover {args.recover}: nothing is pruned. Use a --sparsity_ratio above 0."
        if packs and ratio <= FEWEST_ZEROS:
            yield (
                f"--replace_sparse_layers: packing saves nothing with --sparsity_ratio {ratio:g}. "
                f"Give more than {FEWEST_ZEROS:g}, or leave the flag out."
            )
