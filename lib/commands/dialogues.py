"""Let a chat model answer prompts: dialogues to round, train and measure a smaller one on.

    langprune dialogues MODEL OUT.jsonl --data aya:uk [--count 256]

The prompts are what a person says before the first answer in dialogues, or a passage of plain text
as one would paste it. Answers are sampled as the model's generation_config says. OUT.jsonl has a
row for each dialogue, to be read and edited, and names what has written it; the same command
continues after its last row. Left out are answers that do not end, or are in another script than
the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.chats import Dialogue
from ..data.documents import check_source, pieces_of, read_documents
from ..data.languages import script_of
from ..data.sources import Source, parse_sources
from ..data.templates import prompt_of
from ..data.windows import shuffle_stream
from ..model import pretrained
from ..model.access import Checkpoint
from ..run.completions import continue_rows, decode
from ..run.fingerprint import model_digest
from ..run.flags import POSITIVE
from ..util.command import make_parser
from ..util.errors import UserError
from ..util.files import check_writable
from ..util.progress import progress, quiet

TRIED = 8  # answers, of which half must end
MORE = 4  # prompts for each dialogue that is wanted, at most
PASSAGE = 600  # characters of a plain text, at most
IDENTIFYING = 64  # prompts, the first in their order, whose digest stands for all
WRITER = "written_by"  # key of a row: what decided its answer
ENDLESS = "do not end"


def main(argv: list[str]) -> None:
    args, began = _parser().parse_args(argv), time.monotonic()
    quiet()
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"OUT {out}: name a file that ends with .jsonl")
    check_writable("OUT", str(out.absolute().parent))
    sources = parse_sources(args.data, "--data", column=args.column)
    for source in sources:
        check_source(source, "train")
    checkpoint = Checkpoint(
        args.model, "MODEL", cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    device, config = pretrained.pick_device(args.device), pretrained.load_config(checkpoint)
    tokenizer = pretrained.load_tokenizer(checkpoint)
    window = pretrained.window_length(config, None)
    args.tokens = min(args.tokens, window // 2)
    limit = window - args.tokens
    asked = list(islice(_prompts(sources, tokenizer, limit, args.seed), MORE * args.count))
    if not asked:
        raise UserError(f"--data {' '.join(args.data)}: no prompt is of 1 to {limit} tokens")
    writer = _writer(args, config, [messages for messages, _ in asked[:IDENTIFYING]])
    count = len(answered := _answered(out, writer))
    places = (place for place, (messages, _) in enumerate(asked) if messages in answered)
    left = asked[max(places, default=-1) + 1 :] if count < args.count else []
    left_out: Counter[str | None] = Counter()
    if left:
        script = script_of(" ".join(messages[-1]["content"] for messages, _ in asked))
        dtype = pretrained.pick_dtype("auto", config, device)
        model = pretrained.load_model(checkpoint, config, dtype=dtype, device_map={"": device})
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
    print(f"{out}: {count} dialogues" + f"; left out: {', '.join(reasons)}" * bool(reasons))


def _writer(args: argparse.Namespace, config: Any, prompts: list[Any]) -> dict[str, Any]:
    """Return what decides the answers, which each row of OUT.jsonl names."""
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    return {
        "model": name,
        "weights": model_digest(args.model, config),
        "tokens": args.tokens,
        "seed": args.seed,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }


def _problem(answer: list[int], text: str, most: int, script: str | None) -> str | None:
    """Return why an answer is left out, in words that follow `that`; None where it is kept."""
    if len(answer) == most:
        return ENDLESS
    if not text:
        return "are empty"
    return None if script_of(text) in (script, None) else "are in another script than the prompts"


def _check_ends(args: argparse.Namespace, left_out: Counter[str | None], new: int) -> None:
    """Raise UserError where the first answers, of which `new` are the last, mostly do not end."""
    tried = left_out.total()
    ended = tried - left_out[ENDLESS]
    if tried - new < TRIED <= tried and 2 * ended < tried:
        problem = f"of {tried} answers {ended} end within {args.tokens} tokens"
        raise UserError(f"MODEL {args.model}: {problem}, so it is no chat model")


def _prompts(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, limit: int, seed: int
) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """Yield messages and tokens of different prompts, of one source after another."""
    seen = set()
    for source in sources:
        for document in shuffle_stream(read_documents(source, "train")[0], random.Random(seed)):
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
    add("model", metavar="MODEL", help="hub id or local folder of a chat model")
    add("out", metavar="OUT.jsonl", help="file of dialogues; one that is there is continued")
    data = "prompts, given as for main.py's --calibration_data: dialogues, texts or aya:LANGUAGE"
    add("--data", nargs="+", required=True, metavar="SOURCE", help=data)
    add("--column", default="text", help="of the texts (default: text)")
    add("--count", type=POSITIVE, default=256, help="dialogues to write (default: 256)")
    add("--tokens", type=POSITIVE, default=512, help="of an answer, at most (default: 512)")
    add("--minutes", type=float, default=float("inf"), help="to end after (default: none)")
    add("--seed", type=int, default=0, help="of prompts and answers (default: 0)")
    add("--batch_size", type=POSITIVE, default=8, help="answers at a time (default: 8)")
    add("--device", help="where the model is computed (default: the first GPU, else cpu)")
    add("--cache_dir", help="where models of the hub are kept (default: its own)")
    text = "let the model's own code run (default: no)"
    add("--trust_remote_code", action="store_true", help=text)
    return parser


def _answered(out: Path, writer: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the prompts of the rows that OUT has, which ends with a line break afterwards.

    A last line that was cut off is removed. Raises UserError where a row names another writer.
    """
    text = out.read_bytes() if out.exists() else b""
    if not text.strip():
        return []
    whole, _, last = text.rpartition(b"\n")
    if last.strip():
        with out.open("r+b") as file:
            if _is_json(last):  # as an editor leaves it
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(len(text) - len(last))
                if not whole.strip():
                    return []
    source = parse_sources([str(out)], "OUT")[0]
    prompts = [document.prompt for document in read_documents(source, "train")[0]]
    for number, line in enumerate(out.read_bytes().split(b"\n"), 1):
        before = json.loads(line).get(WRITER, writer) if line.strip() else writer
        if before != writer:
            name = next(key for key in writer if before.get(key) != writer[key])
            raise UserError(
                f"OUT {out}: line {number} was written with {name} {before.get(name)!r}, now it is "
                f"{writer[name]!r}; give the same model, prompts and flags, or name a new file"
            )
    return prompts


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
