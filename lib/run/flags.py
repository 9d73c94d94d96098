"""The command line of main.py: its flags, and which of them contradict each other.

A flag is one entry of GROUPS, with all that a run, a sweep, a report and a card must know of it;
other modules ask `named` for the flags with a fact. `decides` is part of the promise that a run is
resumed, and skipped by a sweep, only if its result is the same. This module imports neither torch
nor transformers, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from ..data.languages import language_text
from ..formats.registry import AUTO, GRIDS, PACKING, QUANTIZED
from ..methods.registry import EXPERT_METHODS, METHODS, is_file
from ..methods.sparsity import (
    ALLOCATIONS,
    EXPERTS,
    SMALLER,
    TYPES,
    UNSTRUCTURED,
    Sparsity,
)
from ..util.cli import typed
from ..util.errors import UserError
from ..vocabulary.choice import MULTIPLE
from .plan import FlagParser, packed

DESCRIPTION = """\
Prune and quantize a Hugging Face causal language model for one language, with text in that
language. Report the loss in quality, and save the smaller model."""
EXAMPLES = """\
examples:
  the published run, calibrated and tested on Ukrainian UberText:
    {0} --model MODEL --prune_method sparsegpt --nsamples 64
  Wanda at 2:4, on web text in your language:
    {0} --model MODEL --prune_method wanda --sparsity_type 2:4 --language uk
  most accurate pruning, then training with the dense model as teacher:
    {0} --model MODEL --prune_method admm --allocation error --calibration_data TEXTS \\
        --recover 500000 --save_model OUT
  4 bits for llama.cpp, with the vocabulary of the texts:
    {1} MODEL SMALL --data TEXTS
    {0} --model SMALL --quantize q4_0 --calibration_data TEXTS --save_model OUT
"""

# what a flag decides, and so how lib/run/fingerprint.py counts it
MODEL = "model"  # by its value
FIGURES = "figures"  # by its value, but for the figures alone
CONTENT = "content"  # a text or model that is named: by its content
NOTHING = "nothing"  # not; device and batch size change results only by rounding
CHANGING = set("prune allocate quantize pack recover save continue".split())  # steps
SWEEP, COMPRESS = ("sweep",), ("compress",)
BOTH = SWEEP + COMPRESS

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
SIZE = _number(float, lambda value: value > 0, "above 0")
PRICED = _number(float, lambda value: value >= 0, "at least 0")
MULTIPLES = _number(
    int, lambda value: value > 0 and value % MULTIPLE == 0, f"a positive multiple of {MULTIPLE}"
)
RATE = _number(float, lambda value: 0 < value < 1, "above 0 and below 1")


def _one_of(names: Collection[str], ends: str, more: str) -> Callable[[str], str]:
    """Return a type of argparse: one of `names`, or a text that contains `ends`."""

    def parse(text: str) -> str:
        if text not in names and ends not in text:
            raise argparse.ArgumentTypeError(f"{text}: must be {', '.join(names)} or {more}")
        return text

    return parse


def _source_of(tag: str) -> str:
    """Return the source of a language's text: a type of argparse."""
    try:
        return language_text(tag)[1]
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{tag}: {error.problem}. {error.fix}") from error


OTHER_GRIDS = ", ".join(name for name in GRIDS if name != "q4_0")
METHOD = _one_of((*METHODS, *EXPERT_METHODS), ".py:", "FILE.py:CLASS")


@dataclass(frozen=True)
class Flag:
    """A flag of main.py: how it is read, and what it means for a run, a sweep and the outputs."""

    name: str
    step: str  # of a run: "load", "read", "draw", "prune", ...; "execute" is all of them
    about: str  # for --help, without the default
    default: Any = None  # False: a switch
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    several: bool = False  # takes one value or more
    shown: str | None = None  # in --help instead of the default
    required: bool = False
    needs: tuple[str, ...] = ()  # flags of which one is required
    excludes: Mapping[str, str] = field(default_factory=dict)  # {flag: why not both}
    decides: str = MODEL
    set_by: tuple[str, ...] = ()  # commands that set it, so that it cannot be passed on to them
    doing: str = ""  # of the flag that asks for its step: what the run does then, in messages
    smaller: tuple[Any, ...] = ()  # values with which its step takes less memory
    folder: bool = False  # names a folder that must not be inside --save_model
    output: bool = False  # names what the run writes besides --save; two runs cannot share it
    in_card: bool = True  # in the command that the model card shows
    has_column: bool = False  # a column of the report shows it, not a note
    sets: str = ""  # another flag, of which it is a form; at most one form can be given

    @property
    def changes(self) -> bool:
        """Whether it is of a step that a run without changes to the blocks does not have."""
        return self.step in CHANGING

    @property
    def changes_alone(self) -> bool:
        """Whether the blocks' weights change, or how they are saved, with this flag alone."""
        return bool(self.doing) and not self.needs

    def add_to(self, group: Any) -> None:
        """Declare the flag in a group of an argparse parser."""
        shown = self.default if self.shown is None else self.shown
        if self.default is False:
            options: dict[str, Any] = dict(action="store_true")
        else:
            options = dict(type=self.parse, nargs="+" if self.several else None)
            options |= dict(dest=self.sets or self.name)
            options |= dict(choices=self.choices, metavar=self.metavar, required=self.required)
        about = self.about
        if shown is not None and shown is not False:
            about += f" (default: {shown})"
        group.add_argument(
            f"--{self.name}", default=self.default, help=about.replace("%", "%%"), **options
        )


# fmt: off
GROUPS: dict[str, list[Flag]] = {
"model": [
    Flag("model", "load", "Hub id (owner/name) or local folder", required=True,
         decides=CONTENT, set_by=SWEEP, folder=True),
    Flag("cache_dir", "load", "folder for weights from the Hub", metavar="FOLDER",
         shown="the Hub's cache", decides=NOTHING, in_card=False),
    Flag("load_bit", "load", "quantize on loading with bitsandbytes: 4 (NF4) or 8 (LLM.int8) bits "
         "per weight", choices=("4", "8")),
    Flag("text_only", "save", "save without vision and audio parts; requires --save_model", False,
         needs=("save_model",),
         excludes={"load_bit": "parts of a quantized model cannot be removed"}),
    Flag("trust_remote_code", "load",
         "run Python code that comes with the model, if you trust it", False),
],
"data": [
    Flag("calibration_data", "draw", "ubertext, c4, a Hub dataset, a file or a folder; "
         "SOURCE=WEIGHT mixes several", several=True, metavar="SOURCE", shown="ubertext",
         decides=CONTENT, set_by=BOTH),
    Flag("data", "draw", "short for --calibration_data", several=True, metavar="SOURCE",
         decides=NOTHING, set_by=BOTH, sets="calibration_data"),
    Flag("language", "draw", "calibrate on FineWeb2 in a language, such as uk or pt-BR; several "
         "are mixed", parse=_source_of, several=True, metavar="TAG",
         decides=NOTHING, set_by=BOTH, sets="calibration_data"),
    Flag("prune_on_c4", "draw", "calibrate on English C4; the test text stays UberText", False,
         excludes={"calibration_data": "it is short for --calibration_data c4"},
         decides=CONTENT, set_by=SWEEP, has_column=True),
    Flag("nsamples", "draw", "number of calibration windows", 128, POSITIVE, metavar="N"),
    Flag("seed", "draw", "seed of the random draw of the windows", 0, int,
         set_by=SWEEP, has_column=True),
    Flag("seqlen", "read", "tokens per calibration or test window", parse=WINDOW,
         metavar="TOKENS", shown="the model's limit, at most 4096"),
    Flag("column", "read", "column that holds the texts, where SOURCE:COLUMN names no other",
         "text", metavar="NAME", decides=CONTENT),
    Flag("bos", "read", "start windows with BOS; auto: if the dense model needs it; never: as "
         "published", "auto", choices=("auto", "never")),
    Flag("no_chat_template", "read", "read dialogues as plain text, without the chat template",
         False),
    Flag("date", "read", "date for chat templates that write one", metavar="YYYY-MM-DD",
         parse=lambda text: str(date.fromisoformat(text)),
         shown="today, or that of the resumed run"),
],
"pruning": [
    Flag("prune_method", "prune", f"one of {', '.join(METHODS)}; for experts "
         f"{', '.join(EXPERT_METHODS)}; or FILE.py:CLASS", parse=METHOD, metavar="METHOD",
         set_by=SWEEP, doing="pruning", smaller=("sparsegpt", "wanda"), has_column=True),
    Flag("sparsity_ratio", "prune", "share of weights, neurons or experts to prune, at least 0 "
         "and below 1; N:M requires N/M", 0.5, float, metavar="SHARE",
         set_by=SWEEP, has_column=True),
    Flag("sparsity_type", "prune", "unstructured: any weights; N:M: N of every M; neurons, "
         "experts: remove whole ones", UNSTRUCTURED, choices=TYPES,
         set_by=SWEEP, has_column=True),
    Flag("use_variant", "prune", "Wanda's variant, a share of zeros per row; requires wanda",
         False, has_column=True),
    Flag("method_args", "prune", "parameters of the method, such as alpha=0.5 for ria; requires "
         "--prune_method", several=True, metavar="NAME=VALUE", needs=("prune_method",)),
    Flag("allocation", "allocate", "sparsity per layer: uniform; error: by effect on outputs; "
         "owl: by outliers; or FILE.json", "uniform", _one_of(ALLOCATIONS, ".json", "FILE.json"),
         metavar="RULE", needs=("prune_method",), doing="measuring errors", smaller=("uniform",)),
],
"quantization and packing": [
    Flag("quantize", "quantize", f"on text; q4_0: every engine; {OTHER_GRIDS}: llama.cpp; "
         "int4: packed; auto, FILE.json: by tensor",
         parse=_one_of(QUANTIZED, ".json", "FILE.json"), metavar="TYPE",
         excludes={"load_bit": "weights can be quantized only once"},
         set_by=COMPRESS, doing="quantizing"),
    Flag("megabytes", "quantize", "size of the GGUF file, for which each tensor's type is chosen; "
         "requires --quantize auto", parse=SIZE, metavar="N", needs=("quantize",), set_by=COMPRESS),
    Flag("replace_sparse_layers", "pack", "save sparse layers packed, of any pattern (published: "
         "2:4 alone); faster on x86-64 CPUs; 2:4 on CUDA: torch's kernels (not timed)", False,
         excludes={"load_bit": "quantized weights cannot be packed"}, doing="packing"),
],
"recovery training": [
    Flag("recover", "recover", "train on this many tokens, with the dense model as teacher; "
         "sparsity and 4 bits stay", parse=POSITIVE, metavar="TOKENS",
         excludes={"eval_only": "--eval_only trains nothing",
                   "load_bit": "quantized weights cannot be trained",
                   "offload_folder": "blocks on disk cannot be trained"},
         set_by=COMPRESS, doing="training"),
    Flag("teacher", "dense", "dense model that MODEL was made from; requires --recover or "
         "--eval_only", metavar="MODEL", needs=("recover", "eval_only"),
         excludes={"offload_folder": "the whole teacher must be in memory",
                   "prune_method": "the model before pruning is its teacher"},
         decides=CONTENT, folder=True),
    Flag("recover_rank", "recover", "train low-rank updates (as LoRA, merged at the end); "
         "requires --recover", parse=POSITIVE, metavar="R", shown="all weights",
         needs=("recover",), smaller=(16,)),
    Flag("recover_optimizer", "recover", "adamw8bit saves 5 bytes of memory per weight, and is "
         "slower on a CPU; requires --recover", "adamw", choices=("adamw", "adamw8bit"),
         needs=("recover",), smaller=("adamw8bit",)),
    Flag("recover_lr", "recover", "peak learning rate; requires --recover", parse=RATE,
         metavar="RATE", shown="by the model's weights and size, see docs/recovery.md",
         needs=("recover",)),
    Flag("recover_ce_weight", "recover", "weight of cross-entropy with the text in the loss, 0: "
         "teacher only; requires --recover", parse=SHARE, metavar="SHARE",
         shown="0.2; 0 for dialogues", needs=("recover",)),
],
"evaluation": [
    Flag("eval_only", "eval", "evaluate the model without pruning, quantizing to q4_0 or training "
         "it", False, excludes={"prune_method": "it prunes nothing"},
         set_by=BOTH, has_column=True),
    Flag("eval_data", "eval", "test texts, as in --calibration_data; each is measured separately",
         several=True, metavar="SOURCE",
         shown="the test text of the data, or a held-out tenth", decides=CONTENT, set_by=SWEEP),
    Flag("eval_windows", "eval", "number of windows per test text, evenly over its documents",
         parse=POSITIVE, metavar="N", shown="all", decides=FIGURES),
    Flag("completions", "eval", "prompts per test text that both models complete or answer",
         3, NATURAL, metavar="N", decides=NOTHING, in_card=False),
    Flag("tasks", "tasks", "tasks of lm-eval to run at the end (Wanda: --eval_zero_shot); "
         "requires lm-eval", parse=lambda names: names.split(","), metavar="NAME,...",
         decides=FIGURES, in_card=False),
    Flag("include_path", "tasks", "folder of your own lm-eval tasks; requires --tasks",
         metavar="FOLDER", needs=("tasks",), decides=CONTENT, in_card=False),
],
"output": [
    Flag("save", "record", "folder for results.json and log_METHOD.txt", metavar="FOLDER",
         shown="out/MODEL-METHOD-TYPE-RATIO",
         decides=NOTHING, set_by=BOTH, folder=True, in_card=False),
    Flag("save_model", "save", "new folder for the model, tokenizer and model card",
         metavar="FOLDER", decides=NOTHING, set_by=BOTH, output=True),
    Flag("save_masks", "prune", "new safetensors file for masks; requires --prune_method",
         metavar="FILE", needs=("prune_method",), decides=NOTHING, output=True),
],
"execution": [
    Flag("device", "execute", "cuda:N, xpu:N or cpu", shown="the first GPU, else cpu",
         decides=NOTHING, in_card=False),
    Flag("dtype", "execute", "compute dtype; auto: the checkpoint's if the device supports it "
         "natively, else float32", "auto", choices=("auto", "float32", "bfloat16", "float16")),
    Flag("batch_size", "execute", "windows per forward pass; results differ only by rounding",
         parse=POSITIVE, metavar="N", shown="by the device and the model's width",
         decides=NOTHING),
    Flag("offload_folder", "execute", "read blocks one at a time, and keep changed ones in this "
         "folder until they are saved", metavar="FOLDER",
         excludes={"load_bit": "blocks cannot be quantized while they are read from disk"},
         decides=NOTHING, set_by=COMPRESS, folder=True, output=True, in_card=False),
    Flag("resume", "continue", "folder for the state of the run; the same command continues it, "
         "and success removes it", metavar="FOLDER",
         decides=NOTHING, set_by=COMPRESS, folder=True, output=True, in_card=False),
    Flag("debug", "execute", "show the full traceback of an error", False,
         decides=NOTHING, in_card=False),
],
}
# fmt: on
FLAGS = [flag for flags in GROUPS.values() for flag in flags]


def named(**facts: Any) -> list[str]:
    """Return the names of the flags with all these facts, in the order of --help.

    `step="prune"`: flags of that step. Of a fact with several values, such as `needs`, one counts.
    """

    def holds(own: Any, value: Any) -> bool:
        return value in own if isinstance(own, tuple) else own == value

    return [
        flag.name
        for flag in FLAGS
        if all(holds(getattr(flag, fact), value) for fact, value in facts.items())
    ]


@cache
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of main.py."""
    parser = FlagParser(
        description=DESCRIPTION,
        usage="%(prog)s --model MODEL [options]",
        epilog=EXAMPLES.format(typed("prune"), typed("trim")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        forms = {flag.sets: group.add_mutually_exclusive_group() for flag in flags if flag.sets}
        for flag in flags:
            flag.add_to(forms.get(flag.sets or flag.name, group))
    return parser


def given(args: argparse.Namespace, name: str) -> bool:
    """Return whether a flag, or one that it sets, differs from its default."""
    name = next((flag.sets for flag in FLAGS if flag.name == name and flag.sets), name)
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
    default = build_parser().get_default
    others = {name: value for name, value in flags.items() if value != default(name)}
    return [*typed("prune").split(), *flag_words(others)]


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return the words of flags of any command; those without a value are left out."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        values = [",".join(values)] if name == "tasks" else values
        words += [f"--{name}", *map(str, values)]
    return words


def without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return words of a command line without the flags `names` and their values."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="*")
    return parser.parse_known_args(words)[1]


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit through parser.error (status 2) if flags contradict each other or have no effect."""
    for mistake in mistakes(args):
        parser.error(str(mistake))


def mistakes(args: argparse.Namespace) -> Iterator[UserError]:
    """Yield the mistakes in the flags, with the flag and its value as `what`."""
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):
            yield UserError(f"--{name} ''", "the value is empty", "Give one, or leave the flag out")
    used = [flag for flag in FLAGS if given(args, flag.name)]
    for flag in used:
        for other, reason in flag.excludes.items():
            if given(args, other):
                fix = f"Leave out {shown(args, other)}"
                yield UserError(shown(args, flag.name), reason, fix)
    try:
        Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    except UserError as error:
        yield error
    for flag in used:
        if flag.needs and not any(given(args, other) for other in flag.needs):
            problem = f"it requires {' or '.join(f'--{other}' for other in flag.needs)}"
            yield UserError(shown(args, flag.name), problem, "Add it, or leave the flag out")
    yield from _pruning_mistakes(args)
    if args.save_model:
        target, saved = Path(args.save_model).resolve(), shown(args, "save_model")
        if args.eval_only and not (packed(vars(args)) or args.text_only):
            problem = "--eval_only leaves the model unchanged"
            yield UserError(saved, problem, "Leave out one of them")
        for name in named(folder=True):
            value = getattr(args, name)
            if value and Path(value).resolve().is_relative_to(target):
                problem = f"--{name} {value} is inside this folder"
                yield UserError(saved, problem, "Name a new folder")


def _pruning_mistakes(args: argparse.Namespace) -> Iterator[UserError]:
    """Yield the mistakes in the flags of pruning, quantization and packing."""
    method, kind, ratio = args.prune_method, args.sparsity_type, args.sparsity_ratio
    packs, form = packed(vars(args)), shown(args, "quantize")
    without_packing = "Leave out --replace_sparse_layers"
    if args.quantize and args.quantize not in PACKING:
        if packs:
            yield UserError(form, "llama.cpp cannot read packed weights", without_packing)
        if args.eval_only:
            problem = "--eval_only does not quantize for llama.cpp"
            yield UserError(form, problem, "Leave out --eval_only")
    if args.quantize == AUTO and not args.megabytes:
        yield UserError(form, "it requires --megabytes", "Add it, or name a type")
    if args.megabytes and args.quantize not in (None, AUTO):
        problem = f"it requires --quantize {AUTO}, not {args.quantize}"
        yield UserError(shown(args, "megabytes"), problem, "Leave out one of them")
    has_text = args.calibration_data or args.prune_on_c4
    rounds = args.quantize and (has_text or not packs)
    if not (method or args.eval_only or args.recover or rounds):
        fix = f"Use {', '.join(METHODS)}, or give --eval_only"
        yield UserError("--prune_method", "none is given", fix)
    if args.use_variant and method != "wanda":
        problem = f"it requires wanda, not {method or 'no method'}"
        yield UserError("--use_variant", problem, "Leave the flag out")
    everywhere = kind in SMALLER or args.allocation == "error"
    fixed = everywhere or (args.allocation == "owl" and kind == "2:4")  # excludes patterns
    for name in ("use_variant", *["allocation"] * fixed) if kind != UNSTRUCTURED else ():
        if given(args, name):
            fix = f"Use --sparsity_type {UNSTRUCTURED}"
            yield UserError(shown(args, name), f"{kind} excludes it", fix)
    if args.save_masks and kind in SMALLER:
        problem = f"--sparsity_type {kind} leaves no zeros"
        yield UserError(shown(args, "save_masks"), problem, "Leave it out")
    if method and not is_file(method) and (kind == EXPERTS) != (method in EXPERT_METHODS):
        fix = f"Use one of {', '.join(EXPERT_METHODS if kind == EXPERTS else METHODS)}"
        yield UserError(f"--prune_method {method}", f"it does not support {kind}", fix)
    if method and kind in SMALLER:
        smaller = f"--sparsity_type {kind}"
        if ratio == 0:
            problem = f"it removes nothing with {smaller}"
            yield UserError("--sparsity_ratio 0", problem, "Use a value above 0")
        if args.load_bit:
            fix = f"Leave out --load_bit {args.load_bit}"
            yield UserError(smaller, "quantized weights stay whole", fix)
        if packs:
            yield UserError(smaller, "it leaves nothing to pack", without_packing)
    if method and kind == UNSTRUCTURED:
        if args.recover and ratio == 0:
            fix = "Use a --sparsity_ratio above 0"
            yield UserError(f"--recover {args.recover}", "nothing is pruned", fix)
        if packs and ratio <= FEWEST_ZEROS:
            problem = f"packing saves nothing with --sparsity_ratio {ratio:g}"
            fix = f"Give more than {FEWEST_ZEROS:g}, or leave the flag out"
            yield UserError("--replace_sparse_layers", problem, fix)
