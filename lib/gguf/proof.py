"""Proves that llama.cpp runs a GGUF file as transformers runs the folder.

Every test document must have the same tokens, and after several beginnings of one window the
log-probabilities of the likeliest tokens must agree within the rounding of the file's type. That
rounding is measured: the model is run once more with rounded weights, and with the inputs of its
linears rounded as in llama.cpp, and llama.cpp must agree with that run.
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
TOP = 256  # likeliest tokens compared after each beginning
FLOOR = 0.02  # distance always allowed: llama.cpp has 16-bit keys and values
TIMES = 1.5  # of the rounding: some values round the other way
CEILING = 0.3  # for types whose rounding is exact here; wrong weights differ by more
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
    """A text that was tokenised alike: its name, and how many documents and tokens it has."""

    name: str
    documents: int
    tokens: int

    def line(self) -> str:
        return f"{self.name}: llama.cpp cuts all {self.documents} documents alike"


@dataclass(frozen=True)
class Logits:
    """Relative distances of log-probabilities after `places` beginnings.

    `distance` is that of llama.cpp from the model, `rounding` that of the model rounded to the type
    from the model, `unexplained` that of llama.cpp from the rounded model. `exact` says that the
    type's rounding of weights is reproduced to the last bit.
    """

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
) -> list[Cut]:
    """Compare the tokens of all `texts`; the first of each is compared with special tokens too.

    Raises UserError at the first difference, and if llama.cpp does not read the file.
    """
    places, expected = [], []
    for name, documents in texts.items():
        for number, text in enumerate(documents, start=1):
            for special in (False, True) if number == 1 else (False,):
                places.append((name, number, text, special))
                expected.append(tokenizer(text, add_special_tokens=special).input_ids)
    requested = [[text, special] for *_, text, special in places]
    answer = _request(file, {"texts": requested, "context": 64})
    for (name, number, _, special), ids, llama_ids in zip(
        places, expected, answer["tokens"], strict=True
    ):
        if ids != llama_ids:
            where = f"document {number} of {name}{' with special tokens' if special else ''}"
            raise UserError(f"{where}: {_difference(tokenizer, ids, llama_ids)}")
    totals: dict[str, int] = {}
    for (name, *_, special), ids in zip(places, expected, strict=True):
        totals[name] = totals.get(name, 0) + (0 if special else len(ids))
    return [Cut(name, len(documents), totals[name]) for name, documents in texts.items()]


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


def window_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, list[str]], config: Any
) -> Tensor:
    """Return the first tokens (1, tokens) of the longest of the first documents.

    They are at most WINDOW, and fewer than the model's limit, since llama.cpp generates one more.
    """
    text = max((documents[0] for documents in texts.values()), key=len)
    most = min(WINDOW, window_length(config, None) - 1)
    return torch.tensor([tokenizer(text).input_ids[:most]])


def letter_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token of letters alone."""
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
    """Compare log-probabilities after beginnings of `window` (1, tokens) with the model's.

    The model is in the folder `weights` and runs in float32. `letter` is the id of a token of
    letters. Raises UserError if they differ by more than rounding.
    """
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
    answer = _request(file, request)
    llama, compared = torch.full_like(dense, torch.nan), torch.zeros_like(dense, dtype=torch.bool)
    for row, pairs in enumerate(answer["logits"]):
        for number, value in pairs:
            if number < dense.shape[-1]:
                llama[row, number], compared[row, number] = value, True
    logits = Logits(
        distance=_distance(dense, llama, compared),
        rounding=_distance(dense, rounded_, compared),
        unexplained=_distance(rounded_, llama, compared),
        places=len(ends),
        exact=TYPES[weight_type].program is None,
    )
    if not logits.unexplained <= logits.limit:
        raise UserError(f"{logits.line()}, which is more than {weight_type} can explain")
    return logits


def _log_probabilities(model: nn.Module, window: Tensor, ends: list[int]) -> Tensor:
    """Return the log-probabilities (ends, rows) after each beginning of `window`."""
    logits = model(window.to(model.device)).logits[0, [end - 1 for end in ends]]
    return logits.double().log_softmax(-1)


def _round_(model: nn.Module, weight_type: str) -> None:
    """Round all matrices along the dimension that products sum over, and the inputs of linears.

    Embedding and head have 8 bits at least.
    """
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


def _distance(reference: Tensor, other: Tensor, compared: Tensor) -> float:
    """Return the distance of log-probabilities (places, rows), relative to their spread.

    Only entries where `compared` is True count.
    """
    difference = torch.where(compared, other - reference, 0.0)
    count = compared.sum(-1, keepdim=True)
    mean = torch.where(compared, reference, 0.0).sum(-1, keepdim=True) / count
    spread = torch.where(compared, reference - mean, 0.0)
    return float(difference.norm() / spread.norm())


def _request(file: Path, request: dict[str, Any]) -> Any:
    try:
        return run_child("lib.gguf.llama_cpp", {"model": str(file)} | request)
    except ChildError as error:
        raise UserError(f"llama.cpp does not run the file: {error}") from error
