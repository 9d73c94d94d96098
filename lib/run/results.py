"""results.json: one dictionary with the settings and figures of a run.

Beside it, allocation.json has the share of zeros that each linear layer should have, not rounded.
A run fills only the keys that it has figures for. Obsolete keys in files of earlier versions
(`abilities`, `fidelity`, `depth`, `products`) are ignored. The keys, in an example:

    {
        "model": "owner/name", "method": "admm",    # or "dense", "recovered", ...
        "loaded_by": "AutoModelForCausalLM",                # null: AutoModelForCausalLM, text only
        "sparsity_type": "2:4", "sparsity_ratio": 0.5,      # null: nothing was pruned
        "flags": {...},                                     # all flags of main.py
        "command": "bash launch.sh prune --model ...",      # repeats the run
        "commit": {"hash": "...", "changed": false},        # of the checkout; main.py and lib/
        "seed": 0, "versions": {"torch": "2.9"}, "bos": 2,
        "date": "2026-11-29",                               # written by the chat template, if any
        "device": "cpu (2 threads)", "processor": "AMD EPYC 9654",
        "calibration": {                                    # null: no text was read
            "name": "uk", "windows": 128, "seqlen": 512, "digest": "...", "sources": [
                {"name": "uk", "source": "texts/uk", "windows": 128, "share": 1.0}]},
        "sparsity": {"overall": 0.5, "linears": {"model.layers.0.mlp.up_proj": 0.5}},
        "allocation": {"model.layers.0.mlp.up_proj": 0.5},  # wanted, if not uniform
        "errors": {"model.layers.0.mlp.up_proj": 0.12},     # relative squared error of outputs
        "notes": ["..."],                                   # fallbacks and layers left dense
        "neurons": {
            "before": 2048, "after": 1536,
            "weights_before": 9, "weights_after": 8, "bytes_before": 9, "bytes_after": 8,
            "removed": [[3, 17]]},                          # removed neurons of each block
        "experts": {..., "routed": [[0.1, 0.9]]},           # as neurons, and shares of tokens
        "vocabulary": {                                     # of a model that `trim` wrote
            "note": "...", "rows": 30000, "rows_before": 262144,
            "digest": "...", "model": "owner/name"},        # the original, by vocabulary.json
        "recovery": {
            "tokens": 300000, "seconds": 60.0, "step_seconds": 55.0, "teacher": "owner/name",
            "cross_entropy": 0.2,
            "text": {...}, "curve": [{                      # `trained`: mean loss of the steps
                "tokens": 0, "loss": 1.2, "perplexity": 30.0, "kl": 0.1, "trained": null}],
            "held_out": {"dense": 20.0},                    # perplexity on held-out training text
            "before": {"uk": {"perplexity": 27.0, "kl": 0.2}}}, # on compared test windows
        "packed": {"bits": 4, "linears": 96, "bytes": 5, "dense_bytes": 16, "difference": 0.01},
        "packed_embeddings": {"modules": ["lm_head"], "bits": 8, "bytes": 5, "dense_bytes": 16},
        "quantized": {
            "format": "q4_0", "tensors": 126, "difference": 0.1,    # of logits, by all changes
            "left": ["model.layers.0.mlp.down_proj.weight"],        # at 16 bits
            "types": {"model.embed_tokens.weight": "q5_0"}},        # if there are several
        "evaluation": [{                                    # one for each test set
            "name": "uk", "source": "texts/uk", "windows": 64, "tokens": 32768, "digest": "...",
            "perplexity": 20.1, "standard_error": 0.4, "bits_per_byte": 0.91,
            "kl": 0.1, "kl_standard_error": 0.01,           # nats per token, from the dense model
            "kl_of_tokens": {"median": 0.05, "99%": 1.2, "99.9%": 3.0, "largest": 6.5},
            "loss_change": 0.1, "loss_change_standard_error": 0.01,     # nats per token, by window
            "top1_agreement": 0.8, "top1_agreement_standard_error": 0.01, "compared_windows": 64,
            "of_windows": 271,                              # if --eval_windows left some out
            "dense": {"perplexity": 18.0, "bits_per_byte": 0.88}}], # if it was measured
        "losses": "losses.npz",                             # file beside it with figures by
                                                            # window, see `write_losses`
        "perplexity": {"uk": 20.1},
        "completions": [{"test": "uk", "prompt": "...", "dense": "...", "model": "..."}],
        "answers": [{"test": "chat", "prompts": 32, "limit": 256,  # tokens; for dialogues
            "dense": {"ended": 30, "in_language": 32, "tokens": 80.5}, "model": {}}],
        "tasks": {"uk_last_word": {"acc,none": 0.73, "acc_stderr,none": 0.03}},     # from lm-eval
        "dense_tasks": {"uk_last_word": {"acc,none": 0.81, "acc_stderr,none": 0.02}},
        "seconds": {"load": 1.0}, "peak_memory": {"host": 9, "device": null},       # bytes
        "footprint": {"before": 9, "after": 5},             # bytes of the model in memory
        "saved_bytes": 5, "dense_bytes": 9,                 # weights saved; original weights
        "fingerprint": {"pruning": {"--nsamples": 128}, "measuring": {}},
    }
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from ..util.errors import UserError
from ..util.files import write_text

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

RESULTS = "results.json"
LOSSES = "losses.npz"  # not safetensors: a folder of these would be taken for a model
NONE = "none"  # name of the calibration text if there is none
NEEDED = ("model", "method", "evaluation")


def is_trained(results: Mapping[str, Any]) -> bool:
    """Return whether training changed the model; False if it did not help and was discarded."""
    recovery = results.get("recovery")
    return bool(recovery) and bool(recovery.get("kept", {"tokens": 1})["tokens"])


def write_results(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results.json, complete or not at all; nan and inf become null, as JSON lacks them."""
    plain = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    path = Path(folder) / RESULTS
    # lists of numbers on one line; a string in JSON has no raw line break
    write_text(path, re.sub(r"\[\n[\d\s.,eE+-]*\]", lambda it: "".join(it[0].split()), text) + "\n")
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read a run's results.json. Raises UserError if it is missing or not a run's."""
    file = Path(folder) / RESULTS
    try:
        results = json.loads(file.read_text("utf-8"))
    except OSError as error:
        problem = f"it cannot be read ({error.strerror})"
        raise UserError(f"RUN {file}", problem, "Name a run") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"RUN {file}", f"it is not valid JSON ({error})", "Run again") from error
    if not isinstance(results, dict):
        raise UserError(f"RUN {file}", "it does not hold results", "Remove it, or run again")
    if missing := [name for name in NEEDED if name not in results]:
        problem = f"it lacks {', '.join(missing)}"
        raise UserError(f"RUN {file}", problem, "Remove it, or run again")
    return results


def write_losses(folder: Path, losses: Mapping[str, Tensor]) -> str:
    """Write the figures of each test window beside results.json; return the file's name.

    For test set 0 of `evaluation`, arrays (windows,) are `0.loss`, float32, the mean negative
    log-likelihood in nats per token, `0.tokens`, int32, the number of tokens that it counts, and
    `0.document`, int32, the number of the document with the window's middle token, or of the
    dialogue that the window begins with. If the dense model was measured, there are also
    `0.dense_loss`, `0.kl` in nats per token, and `0.agreement`; windows that were not compared have
    nan.
    """
    import numpy

    packed = io.BytesIO()
    numpy.savez(packed, **{name: values.numpy() for name, values in losses.items()})
    write_text(folder / LOSSES, packed.getvalue())
    return LOSSES


def read_losses(folder: Path, results: Mapping[str, Any]) -> dict[str, dict[str, ndarray]]:
    """Return {digest of the test windows: {name: array (windows,)}}, see `write_losses`.

    It is empty for a run of an earlier version. Raises UserError if the file cannot be read.
    """
    import numpy

    if "losses" not in results:
        return {}
    file = folder / LOSSES
    try:
        with numpy.load(file) as packed:
            arrays = dict(packed)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"RUN {file}", f"it cannot be read ({error})", "Run again") from error
    return {
        test["digest"]: {
            name.partition(".")[2]: values
            for name, values in arrays.items()
            if name.partition(".")[0] == str(number)
        }
        for number, test in enumerate(results["evaluation"])
    }
