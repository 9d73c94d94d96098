"""The formats of weights by name: one class, one line here. Importing this file imports no torch.

A class has all about its format as attributes, which lib/formats/base.py documents; a format is one
object of its class, made when it is first asked for.
"""

from __future__ import annotations

from collections import ChainMap
from functools import cache
from importlib import import_module
from typing import Any

Q8_0 = "q8_0"  # the type of embedding and head, and of all if that is small enough
AUTO = "auto"  # a type for each tensor, by --megabytes
EXPORTED = "q4_0"  # the type that engines other than llama.cpp run
LLAMA_CPP = {  # types of llama.cpp; a matrix has the first one on whose grid it is
    "q4_0": ".grids:Q4_0",
    "iq4_nl": ".grids:IQ4_NL",
    "q5_0": ".grids:Q5_0",
    "q3_k": ".grids:Q3_K",
}
FILE_ALONE = {Q8_0: ".grids:Q8_0Type"}  # of llama.cpp too, but rounded only in a GGUF file
BY_TENSOR = {AUTO: ".grids:Types"}
PACKING = {"int4": ".int4:Int4"}
UNCHANGED = {"16": "..packed.formats:Values"}


class Formats(ChainMap[str, Any]):
    """Formats by name, of several of the tables above, which are listed from the last one on."""

    def __getitem__(self, name: str) -> Any:
        return _made(super().__getitem__(name))


@cache
def _made(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module, __package__), name)()


GRIDS = Formats(LLAMA_CPP)
TYPES = Formats(FILE_ALONE, LLAMA_CPP)  # of a tensor in a GGUF file
FILES = Formats(BY_TENSOR, LLAMA_CPP, FILE_ALONE)  # of a GGUF file of few bits
QUANTIZED = Formats(BY_TENSOR, PACKING, LLAMA_CPP)  # of --quantize
FORMATS = Formats(UNCHANGED, *QUANTIZED.maps, FILE_ALONE)
