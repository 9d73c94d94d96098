"""The texts and windows of `compress`, by checks of main.py that need no weights."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...data.documents import Corpus, are_dialogues, check_corpus
from ...data.languages import language_text
from ...data.sources import parse_source, parse_sources
from ...formats.registry import AUTO
from ...run.flags import build_parser, check_flags, flag_words, given
from ...util.errors import UserError, fields_named
from .size import check_size, removing
from .steps import CONVERTER, PACKED_FLAGS, WEIGHT
from .work import Compression, Facts

if TYPE_CHECKING:
    from ...run.run import Run

# calibration windows, their tokens, and windows of each test text
ON_CPU, ON_GPU = (32, 512, 64), (128, 1024, 256)
OF_LARGE = (16, 512, 32)  # on a CPU
LARGE = 0.7e9  # weights in the blocks
F32 = 4  # bytes of a weight in the file that OUT.gguf is made from


def find_facts(run: Compression) -> Facts:
    """Check flags, texts, size and disk, and return what the steps follow from."""
    from ...model.pretrained import load_tokenizer
    from ...model.skeleton import build_skeleton, decoder_blocks
    from ...run.check import check_disk, check_room

    args, parsed = run.args, run.parsed
    if args.language:
        _check_language(args.language, bool(args.data))
    data = args.data or [language_text(args.language)[1]]
    sources = parse_sources(data, "--data", mixture=True, column=parsed.column)
    _, blocks = decoder_blocks(build_skeleton(run.config, run.checkpoint))
    weights = sum(weight.numel() for weight in blocks.parameters())
    defaults = ON_GPU if run.device != "cpu" else OF_LARGE if weights > LARGE else ON_CPU
    nsamples, seqlen, eval_windows = defaults
    nsamples = parsed.nsamples if given(parsed, "nsamples") else nsamples
    job = check_job(run, args.model, data, nsamples, seqlen)
    linears = sum(weight.numel() for weight in job.model.small_blocks.parameters())
    more = linears * job.model.save_dtype.itemsize  # of the trimmed model
    more += linears * (F32 + 1) if run.gguf and find_spec(CONVERTER) else 0
    check_disk(job, "OUT", args.out, more)
    with redirect_stdout(io.StringIO()):
        check_room(job, "--work_dir", args.work_dir)
    if args.megabytes and not args.recover:
        check_size(job, args.quantize, args.megabytes, blocks=True)  # the vocabulary is trimmed
    facts = Facts(
        texts=[(source.text, source.weight) for source in sources],
        tests=[test.source.text for test in job.corpora.tests],
        chats=False,
        seqlen=job.windows.seqlen,
        nsamples=nsamples,
        eval_windows=parsed.eval_windows or eval_windows,
        date=job.flags.date,
    )
    if parsed.no_chat_template or not load_tokenizer(run.checkpoint).chat_template:
        return facts
    facts.chats = any(are_dialogues(Corpus(source).documents("train")) for source in sources)
    if args.dialogues != 0 and not facts.chats:
        people = [] if args.data else _people(args.language)
        facts.prompts, facts.chats = [*people, *(source.text for source in sources)], True
        total = sum(weight or 1 for _, weight in facts.texts)
        facts.texts = [(text, (weight or 1) / total) for text, weight in facts.texts]
        tokens = nsamples * facts.seqlen * WEIGHT / (1 + WEIGHT)
        facts.fill = round(tokens * 10 / 9)  # a tenth is held out
    return facts


def _check_language(tag: str, has_data: bool) -> None:
    """Raise UserError if the text of a language cannot be read."""
    source = replace(parse_source(language_text(tag)[1], "--language"), text=tag)
    try:
        check_corpus(Corpus(source), "train")
    except UserError as error:
        fix = "Or leave it out" if has_data else "Or give texts with --data"
        raise UserError(error.what, error.problem, f"{error.fix}. {fix}") from error


def _people(tag: str) -> list[str]:
    """Return the source of people's own prompts in a language; [] if there is none."""
    try:
        check_corpus(Corpus(source := parse_source(f"aya:{tag}", "--language")), "train")
    except UserError:  # the dataset has none
        return []
    return [source.text]


def check_job(run: Compression, model: str, data: list[str], nsamples: int, seqlen: int) -> Run:
    """Return main.py's run of the model, after its checks without weights.

    Windows have `seqlen` tokens, or as many as the texts allow. Neurons or experts are removed, if
    at all, until the size is known.
    """
    from ...model.parts import kind_of
    from ...run.check import check, check_outputs

    args = run.args
    flags = dict(model=model, device=run.device, calibration_data=data, eval_data=args.eval_data)
    flags |= dict(nsamples=nsamples, save_model=args.out, recover=args.recover or None)
    form = "iq4_nl" if args.quantize == AUTO else args.quantize
    flags |= dict(quantize=form) if run.gguf else PACKED_FLAGS
    flags |= removing(kind_of(run.config), "0.5") if args.megabytes and args.recover else {}
    parser = build_parser()
    parsed = parser.parse_args([*flag_words(flags), *run.passed_on])
    check_flags(parser, parsed)
    with fields_named(calibration_data="--data", save_model="OUT"):
        check_outputs(parsed)
        parsed.save_model = None  # no folder is created yet
        with redirect_stdout(io.StringIO()):  # the run will print it
            return check(parsed, longest=seqlen)
