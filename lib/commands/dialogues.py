"""Let a chat model answer prompts, and keep the dialogues as calibration text for this model.
For users of main.py with a chat model; `compress` does it without being asked.

    langprune dialogues MODEL OUT.jsonl --data aya:uk [--count 256]

The prompts are the messages before the first answer of a dialogue, or ask to summarize a passage of
plain text. Answers are sampled with the model's generation_config; one that does not end is cut
after its last sentence. OUT.jsonl has a row for each dialogue, with the settings that wrote it; it
can be read and edited. The same command continues after its last row. Answers that have no whole
sentence, or are in another script than the prompts, are left out. With --fill the command ends as
soon as the dialogues have so many tokens. The exit status is 3 if the model writes too few.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import TOOLS, Dialogue, Document, dialogue_of
from ..data.documents import Corpus, check_corpus, pieces_of
from ..data.languages import REQUESTS, script_of
from ..data.sources import parse_sources
from ..run.flags import POSITIVE
from ..util.cli import NOTHING, make_parser
from ..util.errors import UserError, counted, fields_named, one_line
from ..util.files import check_writable, write_text
from ..util.progress import progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED = 8  # first answers at least, of which one in as many must be of use
MORE = 4  # maximum number of prompts per wanted dialogue
PASSAGE = 600  # maximum characters of a passage of plain text
IDENTIFYING = 64  # first prompts, whose digest identifies all
FILLED = 1 / 4  # least share of --fill: calibration reads a dialogue up to four times
WRITER = "written_by"  # key of a row: the settings of its answer
ENDLESS = "do not end"
SENTENCES = re.compile(r"(?s).*(?:[.!?…][\"'»”’)\]]*(?=\s|$)|[。！？।։؟])")


class NoDialogues(UserError):
    """The model writes too few answers to calibrate on."""


def main(argv: list[str]) -> None:
    try:
        answer(_parser().parse_args(argv), time.monotonic())
    except NoDialogues as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(NOTHING) from error


@fields_named(model="MODEL", eval_data=None, no_chat_template=None)
def answer(args: argparse.Namespace, began: float) -> None:
    """Write OUT.jsonl until --count, --fill or --minutes, counted from `began`, are reached."""
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"OUT {out}", "the name does not end with .jsonl", "Give one that does")
    check_writable("OUT", str(out.absolute().parent))
    corpora = [Corpus(each) for each in parse_sources(args.data, "--data", column=args.column)]
    for corpus in corpora:
        check_corpus(corpus, "train")
    # heavy, and not needed for a wrong flag
    import torch

    from ..data.templates import sample_of_dialogue
    from ..model.checkpoint import Checkpoint
    from ..model.device import pick_device, pick_dtype
    from ..model.pretrained import load_config, load_model, load_tokenizer, window_length
    from ..run.completions import continue_rows, decode

    quiet()
    checkpoint = Checkpoint(
        args.model, "MODEL", cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    device, config = pick_device(args.device), load_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if not tokenizer.chat_template:
        problem = "it is no chat model, since its tokenizer has no chat template"
        raise UserError(str(checkpoint), problem, "Name a chat model")
    window = window_length(config, None)
    args.tokens = min(args.tokens, window // 2)
    limit = window - args.tokens
    request = REQUESTS.get((args.language or "").partition("-")[0], REQUESTS["en"])
    prompts = _prompts(corpora, tokenizer, limit, args.seed, request)
    asked = list(islice(prompts, MORE * args.count))
    if not asked:
        problem = f"no prompt has 1 to {limit} tokens"
        raise NoDialogues(f"--data {' '.join(args.data)}", problem, "Add some")
    writer = _writer(args, config, [messages for messages, *_ in asked[:IDENTIFYING]])
    fill = args.fill or math.inf

    def tokens_of(dialogue: Dialogue) -> int:
        return len(sample_of_dialogue(tokenizer, dialogue).ids) if args.fill else 0

    count = len(written := _answered(out, writer))
    size, answered = sum(map(tokens_of, written)), [dialogue.prompt for dialogue in written]
    places = (place for place, (messages, *_) in enumerate(asked) if messages in answered)
    left = asked[max(places, default=-1) + 1 :] if count < args.count and size < fill else []
    left_out = Counter[str | None]()
    if left:
        texts = (messages[-1]["content"].removeprefix(request) for messages, *_ in asked)
        script = script_of(" ".join(texts))
        dtype = pick_dtype("auto", config, device)
        model = load_model(checkpoint, config, dtype=dtype, device_map={"": device})
        out.parent.mkdir(parents=True, exist_ok=True)
        goal = (args.fill - size, "token") if args.fill else (args.count - count, "dialogue")
        with (
            progress(goal[0], "answering", goal[1]) as bar,
            out.open("a", encoding="utf-8") as file,
        ):
            for start in range(0, len(left), args.batch_size):
                full = count >= args.count or size >= fill
                if full or time.monotonic() - began > 60 * args.minutes:
                    break
                batch = left[start : start + args.batch_size]
                torch.manual_seed(args.seed + count)
                prompts = [ids for *_, ids in batch]
                answers = continue_rows(model, prompts, args.tokens, lambda _: bar(0))
                for (messages, tools, _), answer in zip(batch, answers, strict=True):
                    text = decode(tokenizer, answer).strip()
                    if endless := len(answer) == args.tokens:
                        text = whole_sentences(text)
                    problem = _problem(endless, text, script)
                    left_out[problem] += 1
                    if not problem and count < args.count and size < fill:
                        said = [*messages, {"role": "assistant", "content": text}]
                        row = {"messages": said} | ({TOOLS: tools} if tools else {})
                        more = tokens_of(dialogue_of(row, args.column))
                        file.write(json.dumps(row | {WRITER: writer}, ensure_ascii=False) + "\n")
                        count, size = count + 1, size + more
                        bar(more if args.fill else 1)
                file.flush()
                tried = left_out.total()
                used = left_out[None]
                if tried - len(batch) < TRIED <= tried and used * TRIED < tried:
                    why = _reasons(left_out)
                    problem = f"only {used} of its {tried} answers are of use ({why})"
                    fix = "Use a chat model of the language, --language, or more --tokens"
                    raise NoDialogues(f"MODEL {args.model}", problem, fix)
    reasons = _reasons(left_out)
    left = f"; left out: {reasons}" * bool(reasons)
    of = f" of {size:,} tokens" * bool(args.fill)
    print(f"{out}: {counted(count, 'dialogue')}{of}{left}")
    if args.fill and size < FILLED * args.fill:
        problem = f"the dialogues fill {size:,} tokens of {args.fill:,}"
        raise NoDialogues(f"MODEL {args.model}", problem, "Add prompts, or use a chat model")


def _writer(args: argparse.Namespace, config: Any, prompts: list[Any]) -> dict[str, Any]:
    """Return the settings that determine the answers, for each row of OUT.jsonl."""
    from ..run.fingerprint import model_digest

    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    return {
        "model": name,
        "weights": model_digest(args.model, config),
        "tokens": args.tokens,
        "seed": args.seed,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }


def whole_sentences(text: str) -> str:
    """Return a text to the end of its last whole sentence, "" if it has none."""
    return found[0] if (found := SENTENCES.match(text)) else ""


def _problem(endless: bool, text: str, script: str | None) -> str | None:
    """Return why an answer is left out, in words that follow `that`; None if it is kept."""
    if not text:
        return ENDLESS if endless else "are empty"
    return None if script_of(text) in (script, None) else "are in another script than the prompts"


def _reasons(left_out: Counter[str | None]) -> str:
    """Return how many answers were left out for which reason, in words."""
    return ", ".join(f"{number} that {reason}" for reason, number in left_out.items() if reason)


def _prompts(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    seed: int,
    request: str,
) -> Iterator[tuple[list[dict[str, Any]], Any, list[int]]]:
    """Yield messages, tools and tokens of distinct prompts, one source after another."""
    from ..data.templates import prompt_of

    seen = set()
    for corpus in corpora:
        for document in _passages(corpus, random.Random(seed)):
            if isinstance(document, Dialogue):
                messages, tools = document.prompt, document.tools
            else:
                text = document[:PASSAGE]
                text = whole_sentences(text) or text if len(document) > PASSAGE else text
                content = f"{request}\n\n{text}".strip()
                messages, tools = [{"role": "user", "content": content}], None
            ids = prompt_of(tokenizer, messages, tools)
            if 0 < len(ids) <= limit and tuple(ids) not in seen:
                seen.add(tuple(ids))
                yield messages, tools, ids


def _passages(corpus: Corpus, rng: random.Random) -> Iterator[Document]:
    """Yield dialogues, and of each text the first passage; then further passages of the texts."""
    from ..data.windows import shuffle_stream

    more: list[Document] = []
    for document in shuffle_stream(corpus.documents("train"), rng):
        pieces = pieces_of(document)
        yield from pieces[:1]
        more += pieces[1:]
    rng.shuffle(more)
    yield from more


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("dialogues", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id or local folder of a chat model")
    add("out", metavar="OUT.jsonl", help="output file; an existing file is continued")
    data = "prompts, in the form of main.py's --calibration_data: dialogues, texts or aya:LANGUAGE"
    add("--data", nargs="+", required=True, metavar="SOURCE", help=data)
    add("--column", default="text", help="column of the texts (default: text)")
    text = "language of the texts, such as uk: the model is asked in it (default: in English)"
    add("--language", metavar="TAG", help=text)
    add("--count", type=POSITIVE, default=256, help="number of dialogues (default: 256)")
    text = "number of tokens of all dialogues, with their prompts (default: by --count alone)"
    add("--fill", type=POSITIVE, metavar="TOKENS", help=text)
    add("--tokens", type=POSITIVE, default=512, help="maximum length of an answer (default: 512)")
    add("--minutes", type=float, default=float("inf"), help="time limit in minutes (default: none)")
    add("--seed", type=int, default=0, help="seed of prompts and answers (default: 0)")
    add("--batch_size", type=POSITIVE, default=24, help="answers per batch (default: 24)")
    add("--device", help="cuda:N, xpu:N or cpu (default: the first GPU, else cpu)")
    add("--cache_dir", help="folder for weights from the Hub (default: the Hub's cache)")
    text = "run Python code that comes with the model, if you trust it"
    add("--trust_remote_code", action="store_true", help=text)
    return parser


def _answered(out: Path, writer: dict[str, Any]) -> list[Dialogue]:
    """Return the dialogues in OUT, and let it end with a line break.

    A last line that was cut off is removed. Raises UserError if a row has other settings.
    """
    text = out.read_bytes() if out.exists() else b""
    whole, _, last = text.rpartition(b"\n")
    if last.strip():
        try:
            json.loads(last)
            text += b"\n"  # an editor left out the line break
        except ValueError:
            text = whole + b"\n" * bool(whole)
        write_text(out, text)
    if not text.strip():
        return []
    (source,) = parse_sources([str(out)], "OUT")
    for number, line in enumerate(text.split(b"\n"), 1):
        before = json.loads(line).get(WRITER, writer) if line.strip() else writer
        if before != writer:
            name = next(key for key in writer if before.get(key) != writer[key])
            problem = f"line {number} was written with {name} {before.get(name)!r}, not "
            fix = "Give the same model, prompts and flags, or name a new file"
            raise UserError(f"OUT {out}", f"{problem}{writer[name]!r}", fix)
    return [*Corpus(source).documents("train")]
