"""Compare what an encoder makes of the same texts before and after its vocabulary was trimmed.

An embedder makes vectors, by the modules of its sentence-transformers folder; another model the
means of its last hidden states, and a reranker scores of pairs. All in float32, one text at a time,
from aligned weights: then equal ids and weights give equal bits, where batches, and weights mapped
from files, differ by rounding.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ..data.documents import passages
from ..data.samples import spread
from ..model.pretrained import window_length
from ..util.errors import UserError, first_line
from ..util.host import available, gib
from ..util.progress import progress

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
SENTENCES, DOCUMENTS = 1000, 250  # compared at most
QUERIES, CANDIDATES = 50, 10  # of a reranker, and documents for each
PROVEN = 200  # texts with the same tokens whose vectors are computed again
PASSAGE = 1000  # letters of a document; its first sentence is the query
SENTENCE = re.compile(r"[^.!?。！？।\n]+[.!?。！？।]*")
BYTES = range(60, 600)  # of a sentence
MANY_CHANGED = 0.02  # share of first results above which a line warns
POOLING: dict[str, Callable[[Tensor], Tensor]] = {  # of hidden states (tokens, width)
    "cls": lambda hidden: hidden[0],
    "lasttoken": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.amax(0),
    "mean": lambda hidden: hidden.mean(0),
}


def read_json(path: Path) -> Any:
    """Return the content of a file, {} if there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


class Encoder:
    """The model of a folder. Raises ValueError for modules that are not known here, and any error
    if it cannot be loaded."""

    def __init__(self, folder: Path, trusted: bool = False) -> None:
        self.options = dict(local_files_only=True, trust_remote_code=trusted)
        architecture = (read_json(folder / "config.json").get("architectures") or [""])[0]
        self.is_reranker = architecture.endswith("ForSequenceClassification")
        self.folder, self.steps = folder, []  # functions of what the model gives, in turn
        kind = "Transformer" if architecture else "StaticEmbedding"
        modules = not self.is_reranker and read_json(folder / MODULES)
        modules = modules or [{"type": kind, "path": ""}]
        for module in modules:
            place, kind = folder / module["path"], module["type"].rpartition(".")[2]
            settings = read_json(place / "config.json")
            if kind in ("Transformer", "StaticEmbedding"):
                self.special, self.limit = kind == "Transformer", None
                (self._load if self.special else self._load_static)(place)
                if not self.is_reranker and "Pooling" not in str(modules):
                    self.steps.append(POOLING["mean"])
            elif kind == "Pooling":
                older = [n for n, value in settings.items() if n.startswith("pooling_") and value]
                name = settings.get("pooling_mode") or "+".join(older)
                name = name.removeprefix("pooling_mode_").removesuffix("_tokens")
                self.steps.append(POOLING[name.removesuffix("_token")])
            elif kind == "Dense":
                self.steps.append(_dense(place, settings))
            elif kind not in ("Normalize", "Dropout"):
                raise ValueError(f"{module['type']} is not known here")

    def _load(self, place: Path) -> None:
        auto = AutoModelForSequenceClassification if self.is_reranker else AutoModel
        model = auto.from_pretrained(place, dtype=torch.float32, **self.options).eval()
        for parameter in model.parameters():  # a product's rounding depends on their addresses
            parameter.data = parameter.data.clone()
        self.tokenizer = AutoTokenizer.from_pretrained(place, **self.options)
        longest = read_json(place / "sentence_bert_config.json").get("max_seq_length") or 512
        tables = (each for each in model.modules() if hasattr(each, "position_embeddings"))
        # RoBERTa counts positions from the padding's id
        first = max((getattr(each, "padding_idx", -1) + 1 for each in tables), default=0)
        longest = window_length(model.config, None, longest + first) - first
        self.limit = min(longest, self.tokenizer.model_max_length)
        name = "logits" if self.is_reranker else "last_hidden_state"
        self.run = lambda inputs: getattr(model(**inputs), name)[0]

    def _load_static(self, place: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"))
        (file,) = place.glob("*.safetensors")
        held = load_file(file)
        (table,) = (held[name] for name in ("embedding.weight", "embeddings") if name in held)
        weights = held.get("weights", torch.ones(len(table)))[:, None]
        self.run = lambda inputs: (table.float() * weights)[inputs["input_ids"][0]]

    def inputs(self, texts: Sequence[str]) -> Any:
        """Return the tokens of a text, or of a pair."""
        options = dict(truncation=bool(self.limit), max_length=self.limit)
        options["add_special_tokens"] = self.special
        return self.tokenizer(*texts, return_tensors="pt", **options)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vector (width,) of a text, or the scores of a pair."""
        result = self.run(self.inputs(texts))
        for step in self.steps:
            result = step(result)
        return result.numpy()


def _dense(place: Path, settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the function of a Dense module."""
    if (place / "model.safetensors").is_file():
        held = load_file(place / "model.safetensors")
    else:
        held = torch.load(place / "pytorch_model.bin", weights_only=True)
    acts = {"Identity": torch.nn.Identity(), "Tanh": torch.tanh}
    act = acts[settings.get("activation_function", "Identity").rpartition(".")[2]]
    return lambda vector: act(F.linear(vector, held["linear.weight"], held.get("linear.bias")))


def _texts(folder: Path, texts: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return sentences, queries and documents of held-out texts, with the model's own prompts."""
    prompts = read_json(folder / PROMPTS).get("prompts") or {}
    before = prompts.get("document") or prompts.get("passage") or ""
    sentences = dict.fromkeys(s.strip() for text in texts for s in SENTENCE.findall(text))
    sentences = [each for each in sentences if len(each.encode()) in BYTES]
    pairs = []
    for piece in (piece for text in texts for piece in passages(text, PASSAGE)):
        query = SENTENCE.match(piece)
        if query and len(piece) - query.end() > PASSAGE // 5:
            pairs.append((query[0].strip(), piece[query.end() :].strip()))
    pairs = [pairs[i] for i in spread(len(pairs), DOCUMENTS)]
    return {
        "sentences": [(before + sentences[i],) for i in spread(len(sentences), SENTENCES)],
        "queries": [(prompts.get("query", "") + query,) for query, _ in pairs],
        "documents": [(before + document,) for _, document in pairs],
    }


def compare_vectors(
    before: Path,
    after: Path,
    ids: Sequence[int],
    texts: Sequence[str],
    size: int,
    trusted: bool = False,
) -> dict[str, Any]:
    """Compare both folders' vectors, or scores, of held-out texts; `ids` are the kept ones.

    `size` is the number of weights; code of the model runs if it is `trusted`. Returns a record,
    with a `reason` alone if the original model does not run here. Raises UserError if texts with
    the same tokens have other vectors.
    """
    if 5 * size > available():
        return {"reason": f"memory for {gib(4 * size)} is short"}
    try:
        original = Encoder(before, trusted)
        original(("a", "a")[: 1 + original.is_reranker])
    except Exception as error:  # noqa: BLE001  code of models raises any
        return {"reason": f"the original does not run here: {first_line(error)}"}
    given = _texts(before, texts)
    if original.is_reranker:
        n, queries = len(given["queries"]), given["queries"]
        some = [(i, (i + step) % n) for i in range(min(n, QUERIES)) for step in range(CANDIDATES)]
        given = {"pairs": [(*queries[i], *given["documents"][j]) for i, j in some]}
    flat = [each for kind in given.values() for each in kind]
    if not flat:
        return {"reason": "the held-out texts have no sentences"}
    found = np.stack([*_each(original, flat, "vectors of IN")])
    old = [original.inputs(each).input_ids[0].tolist() for each in flat]
    del original  # before the other is loaded
    trimmed, kept = Encoder(after, trusted), np.array(ids)
    new = [kept[trimmed.inputs(each).input_ids[0].numpy()].tolist() for each in flat]
    alike = np.array([one == other for one, other in zip(old, new, strict=True)])
    proven, others = np.flatnonzero(alike)[spread(alike.sum(), PROVEN)], np.flatnonzero(~alike)
    again, results = [*proven, *others], found.copy()
    vectors = _each(trimmed, [flat[index] for index in again], "vectors of OUT")
    for index, vector in zip(again, vectors, strict=True):
        results[index] = vector
    if not np.array_equal(found[proven], results[proven]):
        problem = "texts with the same tokens have other vectors"
        raise UserError(f"OUT {after.name}", problem, "Please report this")
    record: dict[str, Any] = {"proven": len(proven), "texts": {}, "retrieval": {}}
    both, end = {}, 0
    for name, kind in given.items():
        begin, end = end, end + len(kind)
        both[name] = found[begin:end], results[begin:end]
        record["texts"][name] = [int(alike[begin:end].sum()), len(kind)]
    if "pairs" in both:
        away = np.abs(found - results).max(1)[others]
        scores = [each[:, 0].reshape(-1, CANDIDATES) for each in both["pairs"]]
        record["retrieval"]["queries"] = _kept(*scores)
        worst = max
    else:
        unit = {name: [_unit(each) for each in pair] for name, pair in both.items()}
        away = (_unit(found) * _unit(results)).sum(1)[others]
        alone = (each @ each.T - 4 * np.eye(len(each)) for each in unit["sentences"])
        record["retrieval"]["sentences"] = _kept(*alone)
        found_by = zip(unit["queries"], unit["documents"], strict=True)
        record["retrieval"]["queries"] = _kept(*(a @ b.T for a, b in found_by))
        worst = min
    if len(others):
        name = "difference" if "pairs" in both else "cosine"
        record[name] = {"mean": float(away.mean()), "worst": float(worst(away))}
    return record


def _each(encoder: Encoder, texts: Sequence[tuple[str, ...]], what: str) -> Iterator[np.ndarray]:
    with progress(len(texts), what, "text") as on_progress:
        for each in texts:
            yield encoder(each)
            on_progress(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def _kept(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return the share of queries whose first result stays, and of their first ten results.

    Scores are (queries, documents). Intervals are of 95%: Wilson's, and that of a mean.
    """
    n, z = len(before), 1.96
    if n < 2:
        return {}
    one, other = (np.argsort(-each, 1, kind="stable")[:, :10] for each in (before, after))
    first = float((one[:, 0] == other[:, 0]).mean())
    ten = np.array([np.isin(*pair).mean() for pair in zip(one, other, strict=True)])
    half = z * math.sqrt(first * (1 - first) / n + z * z / 4 / n / n)
    ends = [(first + z * z / 2 / n + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    error = z * float(ten.std(ddof=1)) / math.sqrt(n)
    mean = float(ten.mean())
    around = [mean - error, min(1.0, mean + error)]
    return {"queries": n, "first": [first, *ends], "ten": [mean, *around]}


def lines_of(record: dict[str, Any]) -> list[str]:
    """Return lines on a record of `compare_vectors`."""
    if "reason" in record:
        return [f"not verified: vectors ({record['reason']})"]
    counts = [f"{n:,} of {count:,} {name}" for name, (n, count) in record["texts"].items()]
    lines = [
        f"{', '.join(counts)} have the same tokens; {record['proven']:,} of these were computed "
        "again, one at a time, and are equal bit for bit (in batches, or from a mapped file, to "
        "rounding)"
    ]
    for name, about in (("cosine", "cosine to the original"), ("difference", "difference")):
        if figures := record.get(name):
            both = "{mean:.4f} in the mean, {worst:.4f} at worst".format(**figures)
            lines.append(f"others' {about}: {both}")
    shares = {name: each for name, each in record["retrieval"].items() if each}
    for name, each in shares.items():
        form = "{:.1%} (95% interval {:.1%} to {:.1%})".format
        first, ten = form(*each["first"]), form(*each["ten"])
        line = f"{name} ({each['queries']:,}): the first result stays for {first}"
        lines.append(f"{line}, and {ten} of the first ten stay")
    if any(each["first"][0] < 1 - MANY_CHANGED for each in shares.values()):
        lines.append(f"over {MANY_CHANGED:.0%} of the first results change: give more text")
    return lines
