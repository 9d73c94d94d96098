"""Proves that llama.cpp runs a GGUF file as transformers runs the folder.

Every test document must have the same tokens, and after several beginnings of one window the
log-probabilities of the likeliest tokens must agree within the rounding of the file's type. Of a
file that llama-quantize wrote, first the 16-bit file that it was made of is proven, then that its
weights are those of that file within the rounding, then that llama.cpp runs it as it runs these
weights in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lib.data.sources import Source as Text
from lib.gguf.logits import Reference
from lib.gguf.source import Source
from lib.gguf.tokens import documents_of, letter_of, prove_tokens, window_of
from lib.gguf.types import TYPES
from lib.gguf.weights import prove_weights
from lib.util.host import available, gib


def prove(
    *,
    source: Source,
    weights: Path,
    file: Path,
    before: Path | None,
    weight_type: str,
    texts: Sequence[Text],
    llama: str | None,
) -> Iterator[tuple[str, str, Any]]:
    """Yield each thing proven: (line for the user, name, content) for the record.

    `weights` is the folder with dense weights, `before` the 16-bit file that llama-quantize read,
    which is changed. Raises UserError at the first difference.
    """
    documents = documents_of(texts, source.begins_with_blank)
    cuts = prove_tokens(file, source.tokenizer, documents)
    yield "\n".join(cut.line() for cut in cuts), "tokens", [asdict(cut) for cut in cuts]
    needed = 2 * sum(part.stat().st_size for part in weights.glob("*.safetensors"))
    reference = None
    if needed > available():
        yield f"logits were not compared: that needs {gib(needed)} of memory", "logits", None
    else:
        window = window_of(source.tokenizer, documents, AutoConfig.from_pretrained(weights))
        reference = Reference(weights, window, letter_of(source.tokenizer))
    if before:
        outtype = TYPES[weight_type].outtype
        if reference:
            logits = reference.prove(before, outtype)
            yield f"{outtype}: {logits.line()}", "logits_before", asdict(logits)
        rounded = prove_weights(file, before, llama)
        yield rounded.line(), "weights", asdict(rounded)
    if reference:
        if before:
            logits = reference.prove_rounded(file, before, weight_type)
        else:
            logits = reference.prove(file, weight_type)
        yield logits.line(), "logits", asdict(logits)
