"""The steps of `compress`, from its flags and facts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ...run.flags import without
from ...run.plan import AUTO
from .recipe import Step, Variable
from .work import BLOCKS, DIALOGUES, PACKED, RUN, TABLE, TRIMMED, Compression

MOST_COST = "2%"  # rise of bits per byte for which the vocabulary is trimmed
WEIGHT = 2  # of the dialogues in the calibration text, where the other texts have 1
CHAT_PROMPTS = 8  # answered by both models
CONVERTER = "convert_hf_to_gguf"
PACKED_FLAGS = "--prune_method admm --sparsity_ratio 0.5 --allocation error "
PACKED_FLAGS += "--replace_sparse_layers --quantize int4"
OWN = ("nsamples", "seqlen", "date", "eval_windows")  # flags of main.py with defaults of this one's


def first_steps(run: Compression) -> list[Step]:
    """Return the steps that make the inputs: the dialogues of a chat model, and the trimmed model.

    Dialogues come first, since their tokens stay.
    """
    args, facts, parsed, steps = run.args, run.facts, run.parsed, []
    flags = ["--language", args.language] if args.language else []
    flags += ["--column", parsed.column] if parsed.column != "text" else []
    flags += ["--device", args.device] if args.device else []
    if facts.prompts:
        about = f"The model answers prompts, until calibration has {facts.fill:,} tokens of it"
        words = [args.model, made := run.inside(DIALOGUES), "--data", *facts.prompts, *flags]
        words += ["--fill", str(facts.fill)]
        words += ["--cache_dir", parsed.cache_dir] if parsed.cache_dir else []
        words += ["--trust_remote_code"] if parsed.trust_remote_code else []
        words += ["--count", str(args.dialogues)] if args.dialogues else []
        options = dict(variable="dialogues", grows=True)
        steps.append(Step("dialogues", about, "dialogues", words, made, **options))
    about = f"Trim the vocabulary; if bits per byte rise by more than {MOST_COST}, all of it stays"
    texts = ["--data", *(text for text, _ in facts.texts)] if args.data else []
    dialogues = [Variable("dialogues", flag="" if texts else "--data")] * bool(facts.prompts)
    words = [args.model, made := run.inside(TRIMMED), *texts, *dialogues, *flags]
    words += ["--most_cost", MOST_COST]
    return [*steps, Step("trim", about, "trim", words, made, "model", args.model)]


def last_steps(run: Compression, smaller: Sequence[str]) -> list[Step]:
    """Return the steps that make the model, its other files and the table.

    `smaller` are the flags that remove neurons or experts.
    """
    args, facts, column = run.args, run.facts, run.parsed.column
    dialogues = [Variable("dialogues", f"={WEIGHT}")] * bool(facts.prompts)
    held_out = [Variable("dialogues", ":test")] * bool(facts.prompts and not args.eval_data)
    tests = [*facts.tests, *held_out]
    words = [
        "--model",
        Variable("model", optional=False),
        *(["--device", args.device] if args.device else []),
    ]
    words += ["--calibration_data", *(f"{t}={w:.6g}" if w else t for t, w in facts.texts)]
    words += [*dialogues, "--eval_data", *tests, "--eval_windows", str(facts.eval_windows)]
    words += ["--seqlen", str(facts.seqlen), "--nsamples", str(facts.nsamples), *smaller]
    words += ["--date", facts.date] if facts.date else []
    words += ["--quantize", args.quantize] if run.gguf else PACKED_FLAGS.split()
    words += ["--megabytes", str(args.megabytes)] if args.quantize == AUTO else []
    words += ["--recover", str(args.recover)] if args.recover else []
    words += ["--completions", str(CHAT_PROMPTS)] if facts.chats else []
    words += without(run.passed_on, OWN)
    words += ["--save", run.inside(RUN), "--resume", run.inside(BLOCKS), "--save_model", args.out]
    about = "Prune, quantize and train the weights" if PACKED in args.target else ""
    about = about or f"Quantize the weights with text{' and train them' * bool(args.recover)}"
    steps = [Step("model", about, "prune", words, args.out)]
    if run.gguf and find_spec(CONVERTER):
        words = [args.out, run.gguf, "--type", args.quantize, "--data", *tests]
        words += ["--column", column] if column != "text" else []
        about = "Write the GGUF file, and verify it"
        steps.append(Step("gguf", about, "gguf", words, run.gguf, needed=False))
    for new, to in run.exports.items():
        about, words = f"Write the weights as {to}, and verify them", [args.out, new, "--to", to]
        steps.append(Step(new, about, "export", words, new, needed=False))
    about = "Measure sizes and speeds, and print the table"
    words = ["--table", *run.words]
    return [*steps, Step("table", about, "compress", words, run.inside(TABLE), grows=True)]
