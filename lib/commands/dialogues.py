"""Let a chat model answer prompts: dialogues to round, train and measure a smaller one on.

    langprune dialogues MODEL OUT.jsonl --data aya:uk [--count 256]

The prompts are what a person says before the first answer in dialogues, or a passage of plain text
as one would paste it. Answers are sampled as the model's generation_config says. OUT.jsonl has a
row for each dialogue, to be read and edited; the same command goes on after its last row. Left out
are answers that do not end, or are in another script than the prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..data.chats import Dialogue
from ..data.documents import check_source, pieces_of, read_documents
from ..data.languages import script_of
from ..data.sources import Source, parse_sources
from ..data.templates import prompt_of
from ..data.windows import shuffle_stream
from ..model import pretrained
from ..model.access import Checkpoint, as_user_error
from ..run.completions import continue_rows, decode
from ..run.flags import POSITIVE
from ..util.command import make_parser
from ..util.errors import UserError
from ..util.files import check_writable
from ..util.progress import progress, quiet

TRIED = 8  # answers, of which half must end
MORE = 4  # prompts for each dialogue that is wanted, at most
PASSAGE = 600  # characters of a plain text, at most


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
    written = script_of(" ".join(messages[-1]["content"] for messages, _ in asked))
    count = len(kept := _kept(out))
    places = (place for place, (messages, _) in enumerate(asked) if messages in kept)
    asked = asked[max(places, default=-1) + 1 :] if count < args.count else []
    with as_user_error(checkpoint, "its weights", "download it again"):
        dtype = pretrained.pick_dtype("auto", config, device)
        options = checkpoint.options()
        model = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=dtype, **options)
    model = model.to(device).eval()
    left_out = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = progress(args.count - count, "answering", "dialogue")
    with shown as bar, out.open("a", encoding="utf-8") as file:
        for start in range(0, len(asked), args.batch_size):
            if count >= args.count or time.monotonic() - began > 60 * args.minutes:
                break
            batch = asked[start : start + args.batch_size]
            torch.manual_seed(args.seed + count)
            answers = continue_rows(model, [ids for _, ids in batch], args.tokens)
            for (messages, _), answer in zip(batch, answers, strict=True):
                text, reason = decode(tokenizer, answer).strip(), None
                if len(answer) == args.tokens:
                    reason = "do not end"
                elif not text:
                    reason = "are empty"
                elif script_of(text) not in (written, None):
                    reason = "are in another script than the prompts"
                left_out[reason] += 1
                if not reason and count < args.count:
                    said = [*messages, {"role": "assistant", "content": text}]
                    file.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
                    count += 1
                    bar(1)
            file.flush()
            tried = left_out.total()
            ended = tried - left_out["do not end"]
            if tried - len(batch) < TRIED <= tried and 2 * ended < tried:
                problem = f"of {tried} answers {ended} end within {args.tokens} tokens"
                raise UserError(f"MODEL {args.model}: {problem}, so it is no chat model")
    reasons = [f"{number} that {reason}" for reason, number in left_out.items() if reason]
    print(f"{out}: {count} dialogues" + f"; left out: {', '.join(reasons)}" * bool(reasons))


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
    add("out", metavar="OUT.jsonl", help="file of dialogues, which is gone on with")
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


def _kept(out: Path) -> list[list[dict[str, Any]]]:
    """Return the prompts of the rows that OUT has; a line that was cut off is removed."""
    if not out.exists():
        return []
    whole = out.read_bytes().rpartition(b"\n")
    if whole[2]:
        with out.open("r+b") as file:
            file.truncate(len(whole[0] + whole[1]))
    source = parse_sources([str(out)], "OUT")[0]
    return [document.prompt for document in read_documents(source, "train")[0]] if whole[0] else []
