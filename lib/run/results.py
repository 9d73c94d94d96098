"""results.json: what a run leaves behind, one dictionary, filled where figures are measured.

Beside it, allocation.json has the share of zeros that each linear layer was to have, in full.
A run fills only the keys that it has figures for. What nobody reads any more in files of earlier
versions (`abilities`, `fidelity`, `depth`, `products`) is ignored. The keys, by an example:

    {
        "model": "owner/name", "method": "admm",    # or "dense", "recovered", ...
        "loaded_by": "AutoModelForCausalLM",                # null: by that, as text alone
        "sparsity_type": "2:4", "sparsity_ratio": 0.5,      # null where nothing was pruned
        "flags": {...},                                     # all of the command line
        "command": "bash launch.sh prune --model ...",      # makes the run again
        "commit": {"hash": "...", "changed": false},        # of the checkout; main.py and lib/
        "seed": 0, "versions": {"torch": "2.9"}, "bos": 2,
        "date": "2026-11-29",                               # that the chat template writes, if any
        "device": "cpu (2 threads)", "processor": "AMD EPYC 9654",
        "calibration": {                                    # null where no text was read
            "name": "uk", "windows": 128, "seqlen": 512, "digest": "...", "sources": [
                {"name": "uk", "source": "texts/uk", "windows": 128, "share": 1.0}]},
        "sparsity": {"overall": 0.5, "linears": {"model.layers.0.mlp.up_proj": 0.5}},
        "allocation": {"model.layers.0.mlp.up_proj": 0.5},  # asked for, if not uniform
        "errors": {"model.layers.0.mlp.up_proj": 0.12},     # relative squared, of its outputs
        "notes": ["..."],                                   # what was pruned in another way, or not
        "neurons": {
            "before": 2048, "after": 1536,
            "weights_before": 9, "weights_after": 8, "bytes_before": 9, "bytes_after": 8,
            "removed": [[3, 17]]},                          # of each block, its removed neurons
        "experts": {..., "routed": [[0.1, 0.9]]},           # as neurons; and shares of tokens
        "vocabulary": {
            "note": "...", "rows": 30000, "rows_before": 262144, "digest": "...",
            "rise": 0.02, "likely": 512,    # of held-out text by used tokens; tokens added to these
            "measured_on": {"name": "uk", "bytes": 65536},
            "bits_per_byte_original": 0.75, "bits_per_byte_trimmed": 0.76},
        "recovery": {
            "tokens": 300000, "seconds": 60.0, "teacher": "owner/name", "cross_entropy": 0.2,
            "text": {...}, "curve": [{                      # `trained`: mean loss of the steps
                "tokens": 0, "loss": 1.2, "perplexity": 30.0, "kl": 0.1, "trained": null}],
            "held_out": {"dense": 20.0},                    # perplexity of training text held out
            "before": {"uk": {"perplexity": 27.0, "kl": 0.2}}}, # on a test's compared windows
        "packed": {"bits": 4, "linears": 96, "bytes": 5, "dense_bytes": 16, "difference": 0.01},
        "packed_embeddings": {"modules": ["lm_head"], "bits": 8, "bytes": 5, "dense_bytes": 16},
        "quantized": {
            "format": "q4_0", "tensors": 126, "difference": 0.1,    # of logits, by all changes
            "left": ["model.layers.0.mlp.down_proj.weight"]},       # at 16 bits
        "evaluation": [{                                    # of each test set
            "name": "uk", "source": "texts/uk", "windows": 64, "tokens": 32768, "digest": "...",
            "perplexity": 20.1, "standard_error": 0.4, "bits_per_byte": 0.91,
            "kl": 0.1, "kl_standard_error": 0.01,           # nats a token, from the dense model
            "loss_change": 0.1, "loss_change_standard_error": 0.01,     # nats a token, by window
            "top1_agreement": 0.8, "top1_agreement_standard_error": 0.01, "compared_windows": 64,
            "of_windows": 271,                              # where --eval_windows has left some out
            "dense": {"perplexity": 18.0, "bits_per_byte": 0.88}}], # where it was measured
        "losses": "losses.npz",                             # the file beside it: of the test sets'
                                                            # windows, see `write_losses`
        "perplexity": {"uk": 20.1},
        "completions": [{"test": "uk", "prompt": "...", "dense": "...", "model": "..."}],
        "answers": [{"test": "chat", "prompts": 32, "limit": 256,  # tokens; of test dialogues
            "dense": {"ended": 30, "in_language": 32, "tokens": 80.5}, "model": {}}],
        "tasks": {"uk_last_word": {"acc,none": 0.73, "acc_stderr,none": 0.03}},     # of lm-eval
        "dense_tasks": {"uk_last_word": {"acc,none": 0.81, "acc_stderr,none": 0.02}},
        "seconds": {"load": 1.0}, "peak_memory": {"host": 9, "device": null},       # bytes
        "footprint": {"before": 9, "after": 5},             # bytes of the model in memory
        "saved_bytes": 5, "dense_bytes": 9,                 # weights saved; the original's
        "trimmed_bytes": 7,                                 # those of the trimmed model
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
LOSSES = "losses.npz"  # no safetensors: a folder of these is taken for a model
NONE = "none"  # the name of the calibration text where there is none
NEEDED = ("model", "method", "evaluation")


def is_trained(results: Mapping[str, Any]) -> bool:
    """Whether a training has changed the model: else nothing was better than before it."""
    recovery = results.get("recovery")
    return bool(recovery) and bool(recovery.get("kept", {"tokens": 1})["tokens"])


def write_results(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results.json whole or not at all; nan and inf, which JSON lacks, become null."""
    plain = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    path = Path(folder) / RESULTS
    # numbers in a list stand on one line; no string holds a line break as such
    write_text(path, re.sub(r"\[\n[\d\s.,eE+-]*\]", lambda it: "".join(it[0].split()), text) + "\n")
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read a run's results.json. Raises UserError if there is none, or not of a run."""
    file = Path(folder) / RESULTS
    try:
        results = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"RUN {file}: can't be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"RUN {file}: not valid JSON ({error}); remove it or run again") from error
    if not isinstance(results, dict):
        raise UserError(f"RUN {file}: not a run's results; remove it or run again")
    if missing := [name for name in NEEDED if name not in results]:
        raise UserError(f"RUN {file}: lacks {', '.join(missing)}; remove it or run again")
    return results


def write_losses(folder: Path, losses: Mapping[str, Tensor]) -> str:
    """Write what was measured of each test window beside results.json; return the file's name.

    Arrays (windows,) of the test set with a number in `evaluation` are `0.loss`, float32, the mean
    negative log-likelihood in nats a token, and `0.document`, int32, the number of the document
    that the window's middle token is of. Where the dense model was measured: `0.dense_loss`, `0.kl`
    in nats a token, and `0.agreement`, nan for windows that were not compared.
    """
    import numpy

    packed = io.BytesIO()
    numpy.savez(packed, **{name: values.numpy() for name, values in losses.items()})
    write_text(folder / LOSSES, packed.getvalue())
    return LOSSES


def read_losses(folder: Path, results: Mapping[str, Any]) -> dict[str, dict[str, ndarray]]:
    """Return {digest of the test windows: {name: array (windows,)}}, see `write_losses`.

    It is empty for a run of an earlier version. Raises UserError for a file that can't be read.
    """
    import numpy

    if "losses" not in results:
        return {}
    file = folder / LOSSES
    try:
        with numpy.load(file) as packed:
            arrays = dict(packed)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"RUN {file}: can't be read ({error}); remove it or run again") from error
    return {
        test["digest"]: {
            name.partition(".")[2]: values
            for name, values in arrays.items()
            if name.partition(".")[0] == str(number)
        }
        for number, test in enumerate(results["evaluation"])
    }
