"""Runs llama.cpp through the package xllamacpp in a child process (see child.py).

A request names the `model`, a GGUF file, and may hold `texts` to tokenise ([text, whether special
tokens are added]) and `prompts` (lists of ids). After each prompt the child returns the `top`
likeliest next ids with their log-probabilities.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lib.commands.gguf.child import ChildError, run_child, serve
from lib.util.errors import UserError

WAIT = 600  # seconds for one answer
FORCED = 1000.0  # added to a logit that is to be the highest
F32 = 0  # ggml_type, of cached keys and values
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # texts meet no proxy


def ask(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run llama.cpp on a file. Raises UserError if it does not run it."""
    try:
        return run_child("lib.commands.gguf.llama_cpp", {"model": str(file)} | request)
    except ChildError as error:
        raise UserError(f"llama.cpp does not run the file: {error}") from error


def work(request: dict[str, Any]) -> dict[str, Any]:
    server = start(request["model"], request["context"])

    def post(path: str, fields: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(fields).encode()
        headers = {"Content-Type": "application/json"}
        http_request = urllib.request.Request(server.listening_address + path, body, headers)
        try:
            with DIRECT.open(http_request, timeout=WAIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")) from error

    def tokens_of(text: str, special: bool) -> list[int]:
        fields = {"content": text, "add_special": special, "parse_special": True}
        return post("/tokenize", fields)["tokens"]

    def likeliest(prompt: list[int]) -> list[tuple[int, float]]:
        # an end of the text or a part of a letter would be answered without probabilities, so the
        # answer is forced to be a letter; the log-probabilities do not include that
        fields = {"prompt": prompt, "n_predict": 1, "n_probs": request["top"], "temperature": 0}
        fields |= {"logit_bias": [[request["letter"], FORCED]]}
        (token,) = post("/completion", fields)["completion_probabilities"]
        return [(entry["id"], entry["logprob"]) for entry in token["top_logprobs"]]

    return {
        "tokens": [tokens_of(*text) for text in request.get("texts", [])],
        "logprobs": [likeliest(prompt) for prompt in request.get("prompts", [])],
    }


def start(file: str, context: int) -> Any:
    """Start llama.cpp's server for a file, on the loopback at a free port.

    Attention is computed in 32 bits, so that all is as exact as the file allows.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.cache_type_k = settings.cache_type_v = F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = settings.warmup = False
    settings.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    settings.verbosity = -1
    return xllamacpp.Server(settings)


if __name__ == "__main__":
    serve(work)
