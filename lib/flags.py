"""The command line: every flag, and what flags alone can get wrong.

Imports neither torch nor transformers, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse

from lib.command import Parser, add_debug_flag
from lib.methods import METHODS
from lib.sparsity import ALLOCATIONS, TYPES, UNSTRUCTURED

DESCRIPTION = """\
Prune a Hugging Face causal language model for one language: drop weights by what flows through
them on text of that language, measure what it cost, save a smaller model."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        spoken = "default:" in (action.help or "") or action.default in (None, False)
        return action.help if spoken else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py; the only place where a default stands."""
    parser = Parser(
        description=DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _model_flags(parser.add_argument_group("model"))
    _calibration_flags(parser.add_argument_group("calibration"))
    _pruning_flags(parser.add_argument_group("pruning"))
    _evaluation_flags(parser.add_argument_group("evaluation"))
    _output_flags(parser.add_argument_group("output"))
    return parser


def _model_flags(group) -> None:
    group.add_argument("--model", required=True, help="hub id (owner/name) or local folder")
    group.add_argument("--cache_dir", default="llm_weights", help="folder for weights from the hub")
    group.add_argument(
        "--device", default="cuda:0", help="where blocks are computed: cuda:N, or cpu"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights while working; auto: the checkpoint's on CUDA, float32 on CPU",
    )
    group.add_argument(
        "--load_bit",
        choices=("4", "8"),
        help="quantise on loading, by bitsandbytes: 4 (NF4, double quantisation, bfloat16 "
        "compute) or 8 (LLM.int8) bits per weight",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        help="window in tokens, of calibration and test (default: the model's limit, at most 4096)",
    )
    group.add_argument(
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="begin every window with the BOS token; never: as published; auto: where the "
        "tokenizer adds it by itself and the dense model collapses without it",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        help="windows per forward pass; changes speed and memory, not results beyond rounding "
        "(default: about 1024 tokens' worth on a CPU, 8192 on CUDA)",
    )
    group.add_argument(
        "--offload",
        metavar="FOLDER",
        help="for a model larger than memory: blocks are read from the checkpoint one at a time, "
        "pruned ones kept in this folder until they are saved",
    )
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with the model; only for models you trust",
    )


def _calibration_flags(group) -> None:
    group.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    group.add_argument("--nsamples", type=int, default=128, help="calibration windows")
    group.add_argument(
        "--calibration_data",
        nargs="+",
        metavar="SOURCE",
        help="ubertext, c4, another built-in set, a hub set (owner/name[:config][:split][:column]),"
        " a folder with train*.jsonl[.gz] (rows with `text`), or a file; several as SOURCE=WEIGHT "
        "make a mixture (default: ubertext)",
    )
    group.add_argument(
        "--prune_on_c4",
        action="store_true",
        help="calibrate on English C4, short for --calibration_data c4; the test stays UberText",
    )


def _pruning_flags(group) -> None:
    group.add_argument(
        "--prune_method", choices=tuple(METHODS), help="how the weights to drop are chosen"
    )
    group.add_argument(
        "--sparsity_ratio",
        type=float,
        default=0.5,
        help="share of the weights to drop, in [0, 1); N:M types need N/M",
    )
    group.add_argument(
        "--sparsity_type",
        choices=TYPES,
        default=UNSTRUCTURED,
        help="anywhere, or N of every M consecutive weights of a row",
    )
    group.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="uniform",
        help="of the zeros among blocks, unstructured only; owl: fewer where activations have more "
        "outliers, at an equal total",
    )
    group.add_argument(
        "--use_variant",
        action="store_true",
        help="wanda only: rows get shares of zeros of their own, unstructured",
    )
    group.add_argument(
        "--blend",
        type=float,
        metavar="A",
        help="admm only: how much of what earlier linears broke each one repairs (default: 1, all)",
    )
    group.add_argument(
        "--replace_sparse_layers",
        action="store_true",
        help="2:4 only: swap the pruned linears for packed 2:4 ones before evaluation and saving",
    )


def _evaluation_flags(group) -> None:
    group.add_argument(
        "--eval_only", action="store_true", help="perplexity of the model as it is; prune nothing"
    )
    group.add_argument(
        "--eval_data",
        nargs="+",
        metavar="SOURCE",
        help="test texts, as for --calibration_data, each measured by itself (default: the "
        "calibration folder where it has a test*.jsonl, else ubertext)",
    )
    group.add_argument(
        "--tasks",
        metavar="NAME,...",
        type=lambda text: [name for name in text.split(",") if name],
        help="tasks of lm-eval (if installed) to run on the model after perplexity",
    )


def _output_flags(group) -> None:
    group.add_argument("--save", default="out", help="folder for log_METHOD.txt and results.json")
    group.add_argument("--save_model", help="folder for the pruned model, tokenizer and card")
    group.add_argument(
        "--resume",
        metavar="FOLDER",
        help="keep each pruned block in this folder, so that the same command goes on after an "
        "interruption; removed after success",
    )
    add_debug_flag(group)
