"""The texts of `compress`: of the language, of the user, and dialogues that the model writes."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.chats import Dialogue, row_of
from ...data.documents import PIECE_CHARACTERS, Corpus, are_dialogues, pieces_of
from ...data.languages import language_text
from ...data.sources import PART, parse_source, parse_sources
from ...run.flags import named, without
from ...util import processes
from ...util.errors import UserError, counted
from ...util.files import write_text
from .compression import Compression

if TYPE_CHECKING:
    from ...run.run import Run

FEW_DIALOGUES, TEST_DIALOGUES = 16, 32  # fewest to calibrate on; held-out ones
CHARACTERS = {"test": 1_000_000, "train": 20_000_000}  # downloaded for --language
DIALOGUES = "dialogues"  # folder in that of the command


@dataclass(frozen=True)
class TextNames:
    """The texts of a compression, as flags of main.py name them."""

    data: list[str]  # for --calibration_data
    vocabulary: list[str]  # for --vocabulary_data
    tests: list[str] | None  # None: those of the data
    chat: bool = False  # the data has dialogues
    plain_chat: bool = False  # the model is a chat model, but the data has none


def fetch_text(run: Compression) -> TextNames:
    """Return the texts of the flags; that of the language is downloaded into a folder of its name.

    With --data, tokens of the language's text are kept too, if the Hub can be reached.
    """
    from ...data.hub import keep_text
    from ...run.windows import default_tests

    args, data = run.args, list(run.args.data or [])
    texts = TextNames(data, list(run.parsed.vocabulary_data or []), args.eval_data)
    if not args.language:
        return texts
    folder = run.folder / args.language
    source = parse_source(language_text(args.language)[1], "--language")
    try:
        if not folder.exists():
            keep_text(replace(source, text=args.language), folder, CHARACTERS)
    except UserError as error:
        if not data:
            fix = f"{error.fix}. Or give texts with --data"
            raise UserError(error.what, error.problem, fix) from error
        print(f"{str(error).rstrip('.')}. Its tokens are not counted.", flush=True)
        return texts
    run.keep()
    if not data:
        return replace(texts, data=[str(folder)])
    tests = texts.tests
    if not tests:  # of the data, not of the language
        column = run.parsed.column
        read = parse_sources([*data, *texts.vocabulary], "--data", mixture=True, column=column)
        tests = default_tests(read)
    return replace(texts, vocabulary=[*texts.vocabulary, str(folder)], tests=tests)


def answer_prompts(run: Compression, texts: TextNames) -> TextNames:
    """Let a chat model write its calibration dialogues, if the data has none.

    The texts are checked first, as answers take minutes. dialogues/ gets them, the last ones as a
    test set: two thirds of the calibration text.
    """
    from ...model.pretrained import load_tokenizer

    args, parsed, folder = run.args, run.parsed, run.folder / DIALOGUES
    if parsed.no_chat_template:
        return texts
    sources = parse_sources(texts.data, "--data", mixture=True, column=parsed.column)
    if not load_tokenizer(run.checkpoint).chat_template:
        return texts
    if any(are_dialogues(Corpus(source).documents("train")) for source in sources):
        return replace(texts, chat=True)
    plain = replace(texts, plain_chat=True)
    if not args.dialogues:
        return plain
    if (folder / "test.jsonl").exists():  # an interrupted command has asked
        return with_dialogues(run, texts, folder)
    check_texts(run, texts)
    run.announce("Chat model: it answers prompts, and its answers become calibration text")
    run.keep()
    written = run.folder / f"{DIALOGUES}.jsonl"
    flags = ["--count", args.dialogues, "--minutes", args.minutes / 5, "--device", run.device]
    flags += ["--cache_dir", parsed.cache_dir] if parsed.cache_dir else []
    flags += ["--trust_remote_code"] if parsed.trust_remote_code else []
    flags += ["--language", args.language] if args.language else []
    of_people = [[f"aya:{args.language}"]] if args.language and not args.data else []
    for prompts in [*of_people, [source.text for source in sources]]:
        arguments = ["--data", *prompts, "--column", parsed.column, "--optional", *flags]
        failed = processes.call("commands.dialogues", args.model, written, *arguments)
        if not failed and written.is_file():
            break
    lines = written.read_text("utf-8").split("\n") if written.is_file() else []
    rows = [f"{line}\n" for line in lines if line.strip()]
    if len(rows) < FEW_DIALOGUES:
        few = f"{counted(len(rows), 'dialogue')}, fewer than {FEW_DIALOGUES}"
        print(f"{few}: the model is quantized on plain text instead", flush=True)
        return plain
    folder.mkdir(exist_ok=True)
    held_out = min(TEST_DIALOGUES, len(rows) // 4)
    write_text(folder / "train.jsonl", "".join(rows[:-held_out]))
    write_text(folder / "test.jsonl", "".join(rows[-held_out:]))  # last: all are there
    run.keep()
    return with_dialogues(run, texts, folder)


def with_dialogues(run: Compression, texts: TextNames, folder: Path) -> TextNames:
    """Return the texts with the dialogues in `folder`."""
    from ...run.windows import default_tests

    column = run.parsed.column
    sources = parse_sources(texts.data, "--data", mixture=True, column=column)
    total = sum(source.weight or 1 for source in sources)
    data = [f"{each.text}={(each.weight or 1) / total:.6g}" for each in sources]
    tests = run.args.eval_data or [*(texts.tests or default_tests(sources)), str(folder)]
    return replace(texts, data=[*data, f"{folder}=2"], tests=tests, chat=True)


def check_texts(run: Compression, texts: TextNames) -> None:
    """Raise UserError if texts have no window to calibrate or to test on, or OUT has no room."""
    from ...run.check import check_disk
    from .plan import check_job, files_beside, model_flags

    flags = ["--device", run.device, *model_flags(run, texts), *run.format]
    flags += ["--nsamples", "1", *(["--eval_data", *texts.tests] if texts.tests else [])]
    flags += without(run.passed_on, named(step="trim"))
    job = check_job([*flags, "--save_model", run.args.out], recover=0)
    check_disk(job, "OUT", run.args.out, files_beside(run, job), tables=False)  # to be trimmed


def without_tests(texts: TextNames, job: Run) -> TextNames:
    """Return the texts without held-out documents, which become separate files."""

    def trained(corpus: Corpus) -> str:
        source = corpus.source
        text = PART.sub("", source.text) + ":train" if corpus.parted else source.text
        return text if source.weight is None else f"{text}={source.weight:.6g}"

    more = [each for each in job.corpora.vocabulary if each.source.text in texts.vocabulary]
    data = [*map(trained, job.corpora.calibration)]
    return replace(texts, data=data, vocabulary=[*map(trained, more)])


def cut_tests(job: Run, folder: Path, share: float, rehearsed: bool = False) -> list[str]:
    """Write a share of each test text, at least about two windows; return the files' names.

    Dialogues are kept whole, and all of them. In a rehearsal they are cut too, to two beside the
    first test text, on which the cost of trimming is measured.
    """
    from ...data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for corpus, test in zip(job.corpora.tests, job.windows.tests, strict=True):
        texts = list(test_documents(corpus))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.record["bytes"] * max(share, 2 / len(test.windows)))
        chats = "dialogues" in test.record
        if chats and not (rehearsed and share and not files):
            texts, left = texts[: 2 if rehearsed else None], math.inf
        stem = re.sub(r"[^\w.-]+", "_", test.name)
        while str(folder / f"{stem}.jsonl") in files:
            stem += "_"
        files.append(str(folder / f"{stem}.jsonl"))
        lines = []
        while left > 0 and texts:
            text = texts.pop()
            whole = isinstance(text, Dialogue) or len(text) <= PIECE_CHARACTERS
            if len(text.encode()) > left and not whole:
                texts += reversed(pieces_of(text))  # training leaves them out piece by piece
                continue
            left -= len(text.encode())
            row = row_of(text, job.flags.column)  # read by gguf and main.py
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(Path(files[-1]), "".join(lines))
    return files
