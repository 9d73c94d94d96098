"""Proves that llama.cpp cuts every test document into the same tokens as the folder's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.commands.gguf.llama_cpp import ask
from lib.data.documents import open_documents
from lib.data.sources import Source
from lib.data.windows import test_documents
from lib.model.pretrained import window_length
from lib.util.errors import UserError

SHORT = 256  # tokens of the shorter window
LINES = [
    "Річка тече повз старе місто; пам'ять про під'їзд, ґанок і їжака не згасла.",
    "It's what they've said: the river doesn't wait, we'LL see. I'm sure, you'd agree?",
    "Die Straße führt über Köln nach Österreich – für 12,50 € im Jahr 2024.",
    "L'été dernier, où étiez-vous ? « À la mer », répondit-elle.",
    "Zażółć gęślą jaźń; příliš žluťoučký kůň; árvíztűrő tükörfúrógép.",
    "На востоке светает, ветер стихает, и слышен только шум воды.",
    "河水流过古老的城市。川は古い町を流れる。 강은 오래된 도시를 지나 흐른다.",
    "مرحبا بالعالم، שלום עולם, नमस्ते दुनिया, สวัสดีชาวโลก",
    "🦉🏳️‍🌈👩‍👩‍👧 emoji, signs → ≠ ± §, ꙮ𝔘𐍈 and ﷽",
    "def f(x):\n\treturn {'a': x**2, \"b\": [1, 22, 333, 4444, 55555]}\n\n\n    # end  \n",
    "  two blanks,   three;\ttabs\t\tand\r\nlines\n\n\n\nof nothing   ",
]


def documents_of(sources: Sequence[Source], begins_with_blank: bool) -> dict[str, list[str]]:
    """Return the test documents of each source, and built-in lines in many scripts.

    If the tokenizer `begins_with_blank`, leading blanks of texts are removed: llama.cpp adds one
    more before them as SentencePiece does, tokenizers adds none.
    """
    texts = {"built-in lines": LINES}
    for source in sources:
        with open_documents(source, "test") as (documents, _):
            texts[source.name] = list(test_documents(source, documents))
    if begins_with_blank:
        texts = {
            name: [text.lstrip(" ") for text in documents] for name, documents in texts.items()
        }
    return texts


def prove_tokens(
    file: Path, tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Compare the tokens of all `texts`; the first of each is compared with special tokens too.

    Returns the name of each text with the numbers of its documents and tokens. Raises UserError at
    the first difference, and if llama.cpp does not read the file.
    """
    places, expected = [], []
    for name, documents in texts.items():
        for number, text in enumerate(documents, start=1):
            for special in (False, True) if number == 1 else (False,):
                places.append((name, number, text, special))
                expected.append(tokenizer(text, add_special_tokens=special).input_ids)
    requested = [[text, special] for *_, text, special in places]
    answer = ask(file, {"texts": requested, "context": 64})
    for (name, number, _, special), ids, llama_ids in zip(
        places, expected, answer["tokens"], strict=True
    ):
        if ids != llama_ids:
            where = f"document {number} of {name}{' with special tokens' if special else ''}"
            raise UserError(f"{where}: {_difference(tokenizer, ids, llama_ids)}")
    totals = dict.fromkeys(texts, 0)
    for (name, *_, special), ids in zip(places, expected, strict=True):
        totals[name] += 0 if special else len(ids)
    return [{"name": name, "documents": len(texts[name]), "tokens": totals[name]} for name in texts]


def _difference(tokenizer: PreTrainedTokenizerBase, ids: list[int], llama_ids: list[int]) -> str:
    pairs = zip(ids, llama_ids, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(llama_ids)))

    def shown(sequence: list[int]) -> str:
        part = sequence[place : place + 3]
        return f"{part} {tokenizer.convert_ids_to_tokens(part)}"

    return (
        f"at token {place + 1} llama.cpp has {shown(llama_ids)}, "
        f"the folder's tokenizer {shown(ids)}"
    )


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]], config: Any
) -> dict[str, list[Tensor]]:
    """Return two windows (tokens,) of each source.

    One has the model's full length, as far as the documents go, and begins with the first of them;
    one is short and begins with the last. Full is one less than the model's limit, since llama.cpp
    generates one more.
    """
    full = window_length(config, None) - 1
    windows: dict[str, list[Tensor]] = {}
    for name, documents in texts.items():
        for ordered, most in ((documents, full), (documents[::-1], min(SHORT, full))):
            ids: list[int] = []
            for text in ordered:
                ids += tokenizer(text, add_special_tokens=not ids).input_ids
                if len(ids) >= most:
                    break
            if ids:
                windows.setdefault(name, []).append(torch.tensor(ids[:most]))
    return windows


def letter_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token of letters alone."""
    special = set(tokenizer.all_special_ids)
    return next(
        number
        for number in range(len(tokenizer))
        if number not in special and tokenizer.decode([number]).isalpha()
    )
