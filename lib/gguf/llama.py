"""Call llama.cpp, which the package xllamacpp holds: its functions (llama.h), and its server.

The functions give tokens and the logits of whole texts; the server renders dialogues and measures
speed. The two structures of parameters change between versions. Their fields are set only if all
have the defaults of the pinned version.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import statistics
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError, first_line
from .conversion import LIMIT

INSTALL = "pip install -r requirements-trim.txt"
UNKNOWN = "this version of xllamacpp has parameters that are not known"
PART = 512  # tokens computed at a time
ROUNDS = 3  # repeated measurements of speed
F32 = 0  # ggml_type of cached keys and values
DISABLED = 0  # llama_flash_attn_type
UNPOOLED, RANKING = 0, 4  # llama_pooling_type
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # bypasses any proxy
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# of the pinned version's parameters: fields as `struct` names them, defaults, and places in bytes
LAYOUTS = {
    "model": (
        "2P5i4P6?",
        (0, 0, -1, 1, -1, 1, 0, *[0] * 4, False, False, True, False, False, False),
        dict(n_gpu_layers=16, vocab_only=72),
    ),
    "context": (
        "14i6fif2P2i3P6?3P",
        (512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, *[-1] * 4, 0, 0, *[-1] * 4, 0, -1)
        + (0, 0, 1, 1, 0, 0, 0, False, True, True, True, True, False, 0, 0, 0),
        dict(n_ctx=0, flash_attn_type=52, type_k=104, type_v=108),
    ),
}


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
    "llama_get_embeddings": ctypes.POINTER(ctypes.c_float),
    "llama_get_embeddings_seq": ctypes.POINTER(ctypes.c_float),
    "llama_tokenize": ctypes.c_int32,
    "llama_vocab_is_eog": ctypes.c_bool,
    "llama_supports_gpu_offload": ctypes.c_bool,
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
    llama.llama_backend_init()
    return llama, lines, log


def _parameters(kind: str, **fields: int) -> tuple[_Params, bool]:
    """Return default parameters with other `fields`, and whether these could be set."""
    params = getattr(_library()[0], f"llama_{kind}_default_params")()
    layout, defaults, places = LAYOUTS[kind]
    known = struct.unpack_from(layout, params) == defaults
    for name, value in fields.items() if known else ():
        struct.pack_into("?" if isinstance(value, bool) else "i", params, places[name], value)
    return params, known


def unavailable() -> dict[str, str]:
    """Return what the installed version cannot tell, and why; {} if nothing."""
    try:
        known = all(_parameters(kind)[1] for kind in LAYOUTS)
    except UserError as error:
        return {"tokens and predictions": f"{error.what}: {error.problem}"}
    return {} if known else {"predictions": UNKNOWN}


def has_gpu() -> bool:
    """Return whether the installed package can compute on a GPU here."""
    return _library()[0].llama_supports_gpu_offload()


class Llama:
    """A model of a file in llama.cpp, or its tokenizer alone. ValueError if it does not load."""

    def __init__(
        self, path: Path | str, gpu_layers: int = 0, tokenizer_alone: bool = False
    ) -> None:
        self.llama, lines, log = _library()
        self.llama.llama_log_set(log, None)  # a server in this process sets its own
        lines.clear()
        fields = dict(n_gpu_layers=gpu_layers, vocab_only=tokenizer_alone)
        params, known = _parameters("model", **fields)
        if gpu_layers and not known:
            raise ValueError(UNKNOWN)
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            errors = [line for line in lines if "error" in line] or lines or [""]
            reason = re.sub(r"^.*error loading model( \w+)?: ", "", errors[0])
            raise ValueError(f"llama.cpp does not load it ({reason})")
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.rows = self.llama.llama_vocab_n_tokens(self.vocabulary)

    def close(self) -> None:
        self.llama.llama_model_free(self.model)

    @property
    def first(self) -> int:
        """The id that begins a text: BOS, else an end token."""
        ends = (self.llama.llama_vocab_bos, self.llama.llama_vocab_eos)
        return next((i for each in ends if (i := each(self.vocabulary)) >= 0), 0)

    @property
    def end_of_turn(self) -> int:
        """The id that ends a turn; -1: none."""
        return self.llama.llama_vocab_eot(self.vocabulary)

    def ends_answer(self, token: int) -> bool:
        """Return whether generation stops at a token."""
        return self.llama.llama_vocab_is_eog(self.vocabulary, token)

    def encode(self, text: str, whole: bool = False) -> np.ndarray:
        """Return the ids (tokens,) of a text, whose special tokens count as such.

        A `whole` text also has those that the file's fields add.
        """
        data = text.encode()
        size = len(data) + 16
        while True:
            ids = np.empty(size, np.int32)
            known = self.vocabulary, data, len(data), ctypes.c_void_p(ids.ctypes.data), size
            n = self.llama.llama_tokenize(*known, whole, True)
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

    def logits(
        self, windows: Sequence[Sequence[int]], vectors: bool = False
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield logits (tokens, rows) of PART tokens at a time, after window and first token.

        Keys and values are kept in 32 bits, and attention is not fused, so results are as exact as
        the file allows. The array is overwritten at the next step. `vectors`: those of an embedder
        instead.
        """
        fields = dict(n_ctx=max(map(len, windows)), flash_attn_type=DISABLED)
        params, known = _parameters("context", **fields, type_k=F32, type_v=F32)
        if not known:
            raise ValueError(UNKNOWN)
        context = self.llama.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError("llama.cpp does not begin to compute")
        self.llama.llama_set_n_threads(context, threads(), threads())
        self.llama.llama_set_embeddings(context, vectors)
        try:
            for number, window in enumerate(windows):
                self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
                for begin in range(0, len(window), PART):
                    ids = np.array(window[begin : begin + PART], np.int32)
                    outputs = np.ones(len(ids), np.int8)
                    batch = _Batch(len(ids), ids.ctypes.data, logits=outputs.ctypes.data)
                    if status := self.llama.llama_decode(context, batch):
                        raise ValueError(f"llama.cpp cannot compute a window (status {status})")
                    values, shape = self.llama.llama_get_logits(context), (len(ids), self.rows)
                    if vectors:
                        values, shape = self._vectors(context, len(ids))
                    yield number, begin, np.ctypeslib.as_array(values, shape)
        finally:
            self.llama.llama_free(context)

    def _vectors(self, context: _Pointer, count: int) -> tuple[Any, tuple[int, int]]:
        """Return the vector (1, width) of the last `count` tokens by the file's pooling, the scores
        of a reranker, or without pooling the vectors of all tokens, and their shape."""
        width, pooling = self.llama.llama_model_n_embd_out, self.llama.llama_pooling_type(context)
        if pooling == UNPOOLED:
            return self.llama.llama_get_embeddings(context), (count, width(self.model))
        if pooling == RANKING:
            width = self.llama.llama_model_n_cls_out
        return self.llama.llama_get_embeddings_seq(context, 0), (1, width(self.model))


def threads() -> int:
    """Return the number of threads: OMP_NUM_THREADS, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def losses(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Return the loss in nats of each target (tokens,), float64, by logits (tokens or more, rows).

    The last token of a window has no target.
    """
    logits = logits[: len(targets)]
    return normalizers(logits) - logits[np.arange(len(targets)), targets]


def normalizers(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the sums of exp(logits) of each row, (tokens,) in float64."""
    top = logits.max(-1).astype(np.float64)
    sums = [np.exp(row - most).sum() for row, most in zip(logits, top, strict=True)]
    return top + np.log(sums)


# --------------------------------------------------------------------- asked in a child process


def tokens(model: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of whole texts, split by the file `model`."""
    with closing(Llama(model)) as llama:
        return [llama.encode(text, whole=True).tolist() for text in texts]


def distance(model: str, windows: Sequence[Sequence[int]], expected: str) -> float:
    """Return the distance of the file's log-probabilities from those in the file `expected`.

    That has the `ids` (positions, some) of some tokens after each position of all windows, and
    their log-probabilities, `values`. The distance is relative to the spread of these, over all
    positions.
    """
    with np.load(expected) as stored:
        ids, values = stored["ids"], stored["values"].astype(np.float64)
    squares, at = [], 0
    with closing(Llama(model)) as llama:
        for *_, logits in llama.logits(windows):
            part = slice(at, at := at + len(logits))
            theirs = np.take_along_axis(logits, ids[part], -1) - normalizers(logits)[:, None]
            spread = values[part] - values[part].mean(-1, keepdims=True)
            square = np.square(theirs - values[part]).sum(-1) / np.square(spread).sum(-1)
            squares += square.tolist()
    assert at == len(ids)
    return float(np.sqrt(np.mean(squares)))


def dialogues(model: str, chats: Sequence[Mapping[str, Any]], end: int) -> dict[str, Any]:
    """Return the tokens of dialogues, `chats`, messages and tools, that the file renders.

    Also whether it ends an answer at the token `end` (`stops`).
    """
    texts = rendered(model, chats, strict=True)
    with closing(Llama(model)) as llama:
        ids = [llama.encode(text, whole=True).tolist() for text in texts]
        return {"chats": ids, "stops": llama.ends_answer(end)}


def rendered(model: str, chats: Sequence[Mapping[str, Any]], strict: bool = False) -> list[str]:
    """Return the texts of `chats`, messages with other fields of a request, as a server renders.

    "" for those that the template rejects; ValueError if `strict`.
    """
    server, texts = start(model, 64), []
    # a server that is ended before its loop has begun would wait for ever
    ask(server, "/completion", {"prompt": [0], "n_predict": 1})
    for fields in map(json.loads, map(json.dumps, chats)):
        for call in (call for m in fields["messages"] for call in m.get("tool_calls", [])):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        fields = {key: value for key, value in fields.items() if value is not None}
        try:
            texts.append(ask(server, "/apply-template", fields)["prompt"])
        except ValueError:
            if strict:
                raise
            texts.append("")
    return texts


def ask(server: Any, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of llama.cpp's server. Raises ValueError for an error."""
    body, headers = json.dumps(fields).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, body, headers)
    try:
        with DIRECT.open(request, timeout=LIMIT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode(errors="replace")) from error


def speed(server: Any, prompt: Sequence[int], steps: int) -> list[float]:
    """Return the tokens per second of reading a prompt, and of `steps` tokens generated after it.

    One reading warms up; the figures are medians of ROUNDS others.
    """
    fields = {"prompt": [*prompt], "n_predict": steps, "ignore_eos": True, "temperature": 0}
    fields |= {"cache_prompt": False}
    timings = [ask(server, "/completion", fields)["timings"] for _ in range(ROUNDS + 1)][1:]
    names = "prompt_per_second", "predicted_per_second"
    return [statistics.median(each[name] for each in timings) for name in names]


def speeds(model: str, prompt: Sequence[int], steps: int, gpu_layers: int = 0) -> list[float]:
    """Return `speed` of the file `model`. Raises ValueError if it does not load."""
    Llama(model, gpu_layers).close()  # tells why, as a server does not
    return speed(start(model, 2 * (len(prompt) + steps), gpu_layers), prompt, steps)


def start(file: str, context: int, gpu_layers: int = 0) -> Any:
    """Start llama.cpp's server for a file, at a free port of this machine.

    Attention is computed in 32 bits, so results are as exact as the file allows.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.n_gpu_layers = gpu_layers
    settings.cache_type_k = settings.cache_type_v = F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = settings.warmup = settings.prefill_assistant = False
    settings.cpuparams.n_threads = threads()
    settings.verbosity = -1
    return xllamacpp.Server(settings)
