"""The proof that llama.cpp does with a GGUF file what transformers does with the folder.

Every test document must be cut into the same tokens, and after several beginnings of one window the
log-probabilities of the likeliest tokens must agree within what the file's type rounds. What it
rounds is measured: the same model is run once more with its weights rounded so, and with what its
linears read rounded as llama.cpp rounds that beside such weights; llama.cpp must agree with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lib.data.documents import open_documents
from lib.data.sources import Source
from lib.data.windows import test_documents
from lib.gguf.child import ChildError, run_child
from lib.gguf.types import FLOATS, TYPES, rounded
from lib.model.pretrained import window_length
from lib.util.errors import UserError

WINDOW = 256  # tokens
PLACES = 8  # beginnings of the window
TOP = 256  # likeliest tokens that are compared after each
FLOOR = 0.02  # that llama.cpp may differ: its keys and values are of 16 bits
TIMES = 1.5  # the rounding, which falls otherwise here and there
CEILING = 0.3  # whatever is rounded, where it is known how; other weights differ by more
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


@dataclass(frozen=True)
class Cut:
    """What was cut: `name` of the text, so many `documents` and `tokens`, all alike."""

    name: str
    documents: int
    tokens: int

    def line(self) -> str:
        return f"{self.name}: llama.cpp cuts all {self.documents} documents alike"


@dataclass(frozen=True)
class Logits:
    """Relative distances of log-probabilities after `places` beginnings: of llama.cpp from the
    model (`distance`), of the model rounded to the type from itself (`rounding`), and of llama.cpp
    from the rounded model (`unexplained`). `exact`: it is known to the last bit how the type
    rounds weights."""

    distance: float
    rounding: float
    unexplained: float
    places: int
    exact: bool

    @property
    def limit(self) -> float:
        explained = TIMES * self.rounding
        return max(FLOOR, min(explained, CEILING) if self.exact else explained)

    def line(self) -> str:
        return (
            f"logits after {self.places} beginnings differ by {self.distance:.2g} "
            f"(rounding explains {self.rounding:.2g}, unexplained {self.unexplained:.2g})"
        )


def documents_of(sources: Sequence[Source], begins_with_blank: bool) -> dict[str, list[str]]:
    """The test documents of each source, and lines of many scripts of this module's own.

    `begins_with_blank`: the tokenizer puts a blank before a text. Blanks that a text begins with
    are then left out: llama.cpp puts one more before them as SentencePiece does, tokenizers none.
    """
    texts = {"built-in lines": LINES}
    for source in sources:
        with open_documents(source, "test") as (documents, _):
            texts[source.name] = list(test_documents(source, documents))
    if begins_with_blank:
        texts = {name: [text.lstrip(" ") for text in found] for name, found in texts.items()}
    return texts


def prove_tokens(
    file: Path, tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]]
) -> list[Cut]:
    """Cut all `texts`, without and the first of each with special tokens, by both.

    UserError at the first difference, and where llama.cpp does not read the file.
    """
    places, expected = [], []
    for name, documents in texts.items():
        for number, text in enumerate(documents, start=1):
            for special in (False, True) if number == 1 else (False,):
                places.append((name, number, text, special))
                expected.append(tokenizer(text, add_special_tokens=special).input_ids)
    asked = [[text, special] for *_, text, special in places]
    answer = _ask(file, {"texts": asked, "context": 64})
    for (name, number, _, special), ours, theirs in zip(
        places, expected, answer["tokens"], strict=True
    ):
        if ours != theirs:
            where = f"document {number} of {name}{' with special tokens' if special else ''}"
            raise UserError(f"{where}: {_difference(tokenizer, ours, theirs)}")
    totals: dict[str, int] = {}
    for (name, *_, special), ids in zip(places, expected, strict=True):
        totals[name] = totals.get(name, 0) + (0 if special else len(ids))
    return [Cut(name, len(documents), totals[name]) for name, documents in texts.items()]


def _difference(tokenizer: PreTrainedTokenizerBase, ours: list[int], theirs: list[int]) -> str:
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))

    def shown(ids: list[int]) -> str:
        here = ids[place : place + 3]
        return f"{here} {tokenizer.convert_ids_to_tokens(here)}"

    return (
        f"at token {place + 1} llama.cpp has {shown(theirs)}, the folder's tokenizer {shown(ours)}"
    )


def window_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]], config: Any
) -> Tensor:
    """The first tokens (1, tokens) of the longest first document: at most WINDOW, and less than
    the model reads, for llama.cpp answers with one more."""
    text = max((documents[0] for documents in texts.values()), key=len)
    most = min(WINDOW, window_length(config, None) - 1)
    return torch.tensor([tokenizer(text).input_ids[:most]])


def letter_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token that is a letter or a few."""
    special = set(tokenizer.all_special_ids)
    return next(
        number
        for number in range(len(tokenizer))
        if number not in special and tokenizer.decode([number]).isalpha()
    )


@torch.no_grad()
def prove_logits(
    file: Path, weights: Path, window: Tensor, letter: int, weight_type: str
) -> Logits:
    """Compare log-probabilities after beginnings of `window` (1, tokens) with those of the model
    in the folder `weights`, in float32. `letter`: the id of a token that is a letter. UserError
    where they differ by more than rounding."""
    length = window.shape[1]
    ends = sorted({max(1, length * place // PLACES) for place in range(1, PLACES + 1)})
    model = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, local_files_only=True
    ).eval()
    dense = _log_probabilities(model, window, ends)
    _round_(model, weight_type)
    rounded_ = _log_probabilities(model, window, ends)
    prompts = [window[0, :end].tolist() for end in ends]
    top = min(TOP, dense.shape[-1])
    request = {"prompts": prompts, "top": top, "letter": letter, "context": length + 32}
    answer = _ask(file, request)
    theirs, same = torch.full_like(dense, torch.nan), torch.zeros_like(dense, dtype=torch.bool)
    for row, pairs in enumerate(answer["logits"]):
        for number, value in pairs:
            if number < dense.shape[-1]:
                theirs[row, number], same[row, number] = value, True
    found = Logits(
        distance=_distance(dense, theirs, same),
        rounding=_distance(dense, rounded_, same),
        unexplained=_distance(rounded_, theirs, same),
        places=len(ends),
        exact=TYPES[weight_type].program is None,
    )
    if not found.unexplained <= found.limit:
        raise UserError(f"{found.line()}, which is more than {weight_type} can explain")
    return found


def _log_probabilities(model: nn.Module, window: Tensor, ends: list[int]) -> Tensor:
    """(ends, rows), after each beginning."""
    logits = model(window.to(model.device)).logits[0, [end - 1 for end in ends]]
    return logits.double().log_softmax(-1)


def _round_(model: nn.Module, weight_type: str) -> None:
    """Round weights of more than one dimension, along what a product adds up, and from now on what
    linears read. Embedding and head have 8 bits at least."""
    outer = weight_type if weight_type in FLOATS else "q8_0"
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}

    def round_input(_: nn.Module, inputs: tuple) -> tuple:
        return rounded(inputs[0], outer), *inputs[1:]

    seen: set[int] = set()
    for module in model.modules():
        across = type(module).__name__ == "Conv1D"  # GPT-2's linears hold (in, out)
        if across or isinstance(module, nn.Linear):
            module.register_forward_pre_hook(round_input)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                weight = parameter.mT if across else parameter
                kind = outer if id(module) in ends else weight_type
                weight.copy_(rounded(weight.contiguous(), kind))


def _distance(one: Tensor, other: Tensor, same: Tensor) -> float:
    """Of log-probabilities (places, rows) where `same`, relative to their spread."""
    difference = torch.where(same, other - one, 0.0)
    count = same.sum(-1, keepdim=True)
    mean = torch.where(same, one, 0.0).sum(-1, keepdim=True) / count
    spread = torch.where(same, one - mean, 0.0)
    return float(difference.norm() / spread.norm())


def _ask(file: Path, request: dict[str, Any]) -> Any:
    try:
        return run_child("lib.gguf.llama_cpp", {"model": str(file)} | request)
    except ChildError as error:
        raise UserError(f"llama.cpp does not run the file: {error}") from error
