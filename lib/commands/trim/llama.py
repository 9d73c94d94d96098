"""Call llama.cpp's own functions, which the package xllamacpp exports (llama.h).

The package's server answers one text at a time and gives no probabilities of a whole text. The two
structures of parameters change between versions, so they are passed on as they come.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...util.errors import UserError, first_line

INSTALL = "pip install -r requirements-trim.txt"
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Pointer(ctypes.c_void_p):
    """A pointer; ctypes makes plain numbers of the results of c_void_p itself."""


class _Params(ctypes.Structure):
    """Any of llama.cpp's structures of default parameters; this one is larger than all."""

    _fields_ = [("unknown", ctypes.c_byte * 1024)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("n_tokens", ctypes.c_int32)]
    _fields_ += [(n, ctypes.c_void_p) for n in "token embd pos n_seq_id seq_id logits".split()]


RESULTS = {
    "llama_model_default_params": _Params,
    "llama_context_default_params": _Params,
    "llama_model_load_from_file": _Pointer,
    "llama_init_from_model": _Pointer,
    "llama_model_get_vocab": _Pointer,
    "llama_get_memory": _Pointer,
    "llama_get_logits": ctypes.POINTER(ctypes.c_float),
    "llama_tokenize": ctypes.c_int32,
}


@cache
def _library() -> tuple[Any, list[str], Any]:
    """Return llama.cpp, the lines that it has logged, and the function that collects them."""
    try:
        from xllamacpp import xllamacpp

        llama = ctypes.CDLL(xllamacpp.__file__)
        for name, result in RESULTS.items():
            getattr(llama, name).restype = result
    except (ImportError, OSError, AttributeError) as error:
        problem = f"it does not export llama.cpp's functions here ({first_line(error)})"
        raise UserError("xllamacpp", problem, f"Run {INSTALL}") from error
    lines: list[str] = []
    log = Log(lambda _, text, __: lines.append(text.decode(errors="replace").strip()))
    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    return llama, lines, log


class Llama:
    """A model of a file in llama.cpp. Raises ValueError if it does not load."""

    def __init__(self, path: Path) -> None:
        self.llama, lines, _ = _library()
        lines.clear()
        params = self.llama.llama_model_default_params()
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            errors = [line for line in lines if "error" in line] or lines or [""]
            reason = re.sub(r"^.*error loading model( \w+)?: ", "", errors[0])
            raise ValueError(f"llama.cpp does not load it ({reason})")
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.rows = self.llama.llama_vocab_n_tokens(self.vocabulary)

    def free(self) -> None:
        self.llama.llama_model_free(self.model)

    @property
    def first(self) -> int:
        """The id that begins a text: BOS, else an end token."""
        ends = (self.llama.llama_vocab_bos, self.llama.llama_vocab_eos)
        return next((i for each in ends if (i := each(self.vocabulary)) >= 0), 0)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (tokens,) of a text, whose special tokens count as such."""
        data = text.encode()
        size = len(data) + 16
        while True:
            ids = np.empty(size, np.int32)
            known = self.vocabulary, data, len(data), ctypes.c_void_p(ids.ctypes.data), size
            n = self.llama.llama_tokenize(*known, False, True)
            if n >= 0:
                return ids[:n].copy()
            size = -n  # a normalizer can make more letters of a few

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of texts, encoded on all cores."""
        with ThreadPoolExecutor(threads()) as pool:  # ctypes releases the interpreter's lock
            return [*pool.map(self.encode, texts)]

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the text of ids (tokens,), special tokens too."""
        ids, size = np.ascontiguousarray(ids, np.int32), 64
        while True:
            text, place = ctypes.create_string_buffer(size), ctypes.c_void_p(ids.ctypes.data)
            known = self.vocabulary, place, len(ids), text, size
            n = self.llama.llama_detokenize(*known, False, True)
            if n >= 0:
                return text.raw[:n]
            size = -n

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits (tokens, rows) of each window."""
        params = self.llama.llama_context_default_params()
        context = self.llama.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError("llama.cpp does not begin to compute")
        self.llama.llama_set_n_threads(context, threads(), threads())
        for window in windows:
            n, outputs = len(window), np.ones(len(window), np.int8)
            ids = np.array(window, np.int32)
            self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
            batch = _Batch(n, ids.ctypes.data, logits=outputs.ctypes.data)
            if status := self.llama.llama_decode(context, batch):
                raise ValueError(f"llama.cpp cannot compute a window (status {status})")
            values = self.llama.llama_get_logits(context)
            yield np.ctypeslib.as_array(values, (n, self.rows)).copy()
        self.llama.llama_free(context)


def threads() -> int:
    """Return the number of threads: OMP_NUM_THREADS, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
