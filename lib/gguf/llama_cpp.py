"""Runs llama.cpp through the package xllamacpp in a child process (see child.py).

A request names the `model`, a GGUF file, and may hold `texts` to tokenise ([text, whether special
tokens are added]) and `prompts` (lists of ids). After each prompt the child returns the `top`
likeliest next ids with their log-probabilities, and a greedy continuation by `continued` tokens.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lib.gguf.child import ChildError, run_child, serve, threads
from lib.util.errors import UserError

WAIT = 600  # seconds for one answer
FORCED = 1000.0  # added to a logit that is to be the highest


def ask(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run llama.cpp on a file. Raises UserError if it does not run it."""
    try:
        return run_child("lib.gguf.llama_cpp", {"model": str(file)} | request)
    except ChildError as error:
        raise UserError(f"llama.cpp does not run the file: {error}") from error


def work(request: dict[str, Any]) -> dict[str, Any]:
    server = _started(request)

    def post(path: str, fields: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(fields).encode()
        headers = {"Content-Type": "application/json"}
        http_request = urllib.request.Request(server.listening_address + path, body, headers)
        try:
            with urllib.request.urlopen(http_request, timeout=WAIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from error

    cut = [
        post("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        for text, special in request.get("texts", [])
    ]
    return {
        "tokens": [answer["tokens"] for answer in cut],
        "logits": [
            _next(post, ids, request["top"], request["letter"])
            for ids in request.get("prompts", [])
            if "letter" in request
        ],
        "completions": [
            _completion(post, ids, request["continued"])
            for ids in request.get("prompts", [])
            if request.get("continued")
        ],
    }


def _started(request: dict[str, Any]) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = request["model"]
    settings.n_ctx = request["context"]
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.fit_params = settings.warmup = False
    settings.cpuparams.n_threads = threads()
    settings.verbosity = -1
    return xllamacpp.Server(settings)  # on the loopback, at a free port


def _next(post: Any, ids: list[int], top: int, letter: int) -> list[tuple[int, float]]:
    """Return the likeliest ids after a prompt with their log-probabilities.

    `letter` is the id that is forced as the answer; log-probabilities do not include the bias.
    """
    fields = {"prompt": ids, "n_predict": 1, "n_probs": top, "temperature": 0}
    # an end of the text or a part of a letter would be answered without probabilities
    fields |= {"logit_bias": [[letter, FORCED]]}
    (token,) = post("/completion", fields)["completion_probabilities"]
    return [(entry["id"], entry["logprob"]) for entry in token["top_logprobs"]]


def _completion(post: Any, ids: list[int], tokens: int) -> list[int]:
    """Continue a prompt greedily; return the new ids."""
    fields = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True}
    return post("/completion", fields | {"cache_prompt": False, "ignore_eos": True})["tokens"]


if __name__ == "__main__":
    serve(work)
