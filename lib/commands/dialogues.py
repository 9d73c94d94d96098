"""Let a chat model answer prompts, and keep the dialogues as calibration text for this model.
For users of main.py with a chat model; `compress` does it without being asked.

    langprune dialogues MODEL OUT.jsonl --data aya:uk [--count 256]

The prompts are the messages before the first answer of a dialogue, or passages of plain text.
Answers are sampled with the model's generation_config. OUT.jsonl has a row for each dialogue, with
the settings that wrote it; it can be read and edited. The same command continues after its last
row. Answers that do not end, or are in another script than the prompts, are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Dialogue
from ..data.documents import Corpus, check_corpus, pieces_of
from ..data.languages import script_of
from ..data.sources import parse_sources
from ..run.flags import POSITIVE
from ..util.cli import make_parser
from ..util.errors import UserError, counted
from ..util.files import check_writable, write_text
from ..util.progress import progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED = 8  # first answers, at least half of which must end
MORE = 4  # maximum number of prompts per wanted dialogue
PASSAGE = 600  # maximum characters of a passage of plain text
IDENTIFYING = 64  # first prompts, whose digest identifies all
WRITER = "written_by"  # key of a row: the settings of its answer
ENDLESS = "do not end"


def main(argv: list[str]) -> None:
    args, began = _parser().parse_args(argv), time.monotonic()
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"OUT {out}", "the name does not end with .jsonl", "Give one that does")
    check_writable("OUT", str(out.absolute().parent))
    corpora = [Corpus(each) for each in parse_sources(args.data, "--data", column=args.column)]
    for corpus in corpora:
        check_corpus(corpus, "train")
    # heavy, and not needed for a wrong flag
    import torch

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
    window = window_length(config, None)
    args.tokens = min(args.tokens, window // 2)
    limit = window - args.tokens
    asked = list(islice(_prompts(corpora, tokenizer, limit, args.seed), MORE * args.count))
    if not asked:
        problem = f"no prompt has 1 to {limit} tokens"
        raise UserError(f"--data {' '.join(args.data)}", problem, "Add some")
    writer = _writer(args, config, [messages for messages, _ in asked[:IDENTIFYING]])
    count = len(answered := _answered(out, writer))
    places = (place for place, (messages, _) in enumerate(asked) if messages in answered)
    left = asked[max(places, default=-1) + 1 :] if count < args.count else []
    left_out: Counter[str | None] = Counter()
    if left:
        script = script_of(" ".join(messages[-1]["content"] for messages, _ in asked))
        dtype = pick_dtype("auto", config, device)
        model = load_model(checkpoint, config, dtype=dtype, device_map={"": device})
        out.parent.mkdir(parents=True, exist_ok=True)
        shown = progress(args.count - count, "answering", "dialogue")
        with shown as bar, out.open("a", encoding="utf-8") as file:
            for start in range(0, len(left), args.batch_size):
                if count >= args.count or time.monotonic() - began > 60 * args.minutes:
                    break
                batch = left[start : start + args.batch_size]
                torch.manual_seed(args.seed + count)
                answers = continue_rows(model, [ids for _, ids in batch], args.tokens)
                for (messages, _), answer in zip(batch, answers, strict=True):
                    text = decode(tokenizer, answer).strip()
                    problem = _problem(answer, text, args.tokens, script)
                    left_out[problem] += 1
                    if not problem and count < args.count:
                        said = [*messages, {"role": "assistant", "content": text}]
                        row = {"messages": said, WRITER: writer}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        count += 1
                        bar(1)
                file.flush()
                _check_ends(args, left_out, len(batch))
    reasons = [f"{number} that {reason}" for reason, number in left_out.items() if reason]
    left = f"; left out: {', '.join(reasons)}" * bool(reasons)
    print(f"{out}: {counted(count, 'dialogue')}{left}")


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


def _problem(answer: list[int], text: str, most: int, script: str | None) -> str | None:
    """Return why an answer is left out, in words that follow `that`; None if it is kept."""
    if len(answer) == most:
        return ENDLESS
    if not text:
        return "are empty"
    return None if script_of(text) in (script, None) else "are in another script than the prompts"


def _check_ends(args: argparse.Namespace, left_out: Counter[str | None], new: int) -> None:
    """Raise UserError if most of the first answers do not end; the last `new` of them are new."""
    tried = left_out.total()
    ended = tried - left_out[ENDLESS]
    if tried - new < TRIED <= tried and 2 * ended < tried:
        problem = f"only {ended} of {tried} answers end within {args.tokens} tokens"
        raise UserError(f"MODEL {args.model}", problem, "Use a chat model, or more --tokens")


def _prompts(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, limit: int, seed: int
) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """Yield messages and tokens of distinct prompts, one source after another."""
    from ..data.templates import prompt_of
    from ..data.windows import shuffle_stream

    seen = set()
    for corpus in corpora:
        for document in shuffle_stream(corpus.documents("train"), random.Random(seed)):
            if isinstance(document, Dialogue):
                messages = document.prompt
            else:
                passage = next(iter(pieces_of(document)), "")[:PASSAGE]
                cut = max(passage.rfind(end) for end in (". ", "! ", "? ", "\n")) + 1
                passage = passage[:cut] if len(passage) == PASSAGE and cut else passage
                messages = [{"role": "user", "content": passage.strip()}]
            ids = prompt_of(tokenizer, messages)
            if 0 < len(ids) <= limit and tuple(ids) not in seen:
                seen.add(tuple(ids))
                yield messages, ids


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("dialogues", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id or local folder of a chat model")
    add("out", metavar="OUT.jsonl", help="output file; an existing file is continued")
    data = "prompts, in the form of main.py's --calibration_data: dialogues, texts or aya:LANGUAGE"
    add("--data", nargs="+", required=True, metavar="SOURCE", help=data)
    add("--column", default="text", help="column of the texts (default: text)")
    add("--count", type=POSITIVE, default=256, help="number of dialogues (default: 256)")
    add("--tokens", type=POSITIVE, default=512, help="maximum length of an answer (default: 512)")
    add("--minutes", type=float, default=float("inf"), help="time limit in minutes (default: none)")
    add("--seed", type=int, default=0, help="seed of prompts and answers (default: 0)")
    add("--batch_size", type=POSITIVE, default=8, help="answers per batch (default: 8)")
    add("--device", help="cuda:N, xpu:N or cpu (default: the first GPU, else cpu)")
    add("--cache_dir", help="folder for weights from the Hub (default: the Hub's cache)")
    text = "run Python code that comes with the model, if you trust it"
    add("--trust_remote_code", action="store_true", help=text)
    return parser


def _answered(out: Path, writer: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the prompts of the rows in OUT, and let it end with a line break.

    A last line that was cut off is removed. Raises UserError if a row has other settings.
    """
    text = out.read_bytes() if out.exists() else b""
    whole, _, last = text.rpartition(b"\n")
    if last.strip():
        complete = _is_json(last)  # an editor left out the line break
        text = text + b"\n" if complete else whole + b"\n" * bool(whole)
        write_text(out, text)
    if not text.strip():
        return []
    (source,) = parse_sources([str(out)], "OUT")
    prompts = [document.prompt for document in Corpus(source).documents("train")]
    for number, line in enumerate(text.split(b"\n"), 1):
        before = json.loads(line).get(WRITER, writer) if line.strip() else writer
        if before != writer:
            name = next(key for key in writer if before.get(key) != writer[key])
            problem = f"line {number} was written with {name} {before.get(name)!r}, not "
            fix = "Give the same model, prompts and flags, or name a new file"
            raise UserError(f"OUT {out}", f"{problem}{writer[name]!r}", fix)
    return prompts


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
