"""A checkpoint that a flag names, with one-line errors for everything that can stop its loading.

The Hub is queried once, with a short time limit, since transformers' own attempts take half a
minute to fail. If the Hub cannot be reached, a copy in the cache is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import safe_open

from ..packed.errors import PackedError
from ..util.errors import UserError, first_line, hub_problem
from ..util.quirks import LAYER_COUNT

TIMEOUT = 10.0  # seconds for the Hub's answer
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
CONVERT = (
    "Run 'python benchmarks/to_safetensors.py MODEL NEW' and name NEW, or name a model that has "
    "them, such as huggyllama/llama-7b"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk or on the Hub, and the flag that named it; as text `--model NAME`."""

    name: str
    flag: str = "--model"
    cache_dir: str | None = None  # for the Hub's files; None: huggingface_hub's default
    trust_remote_code: bool = False
    revision: str | None = field(default=None, compare=False)  # a commit on the Hub

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    def pinned(self, config: Any) -> Checkpoint:
        """Return the checkpoint at the commit of its config, even if the Hub has a newer one."""
        return replace(self, revision=getattr(config, "_commit_hash", None))

    def options(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`, besides the name."""
        options = dict(cache_dir=self.cache_dir, trust_remote_code=self.trust_remote_code)
        options |= {"revision": self.revision} if self.revision else {}
        return options | {"local_files_only": local_only(self)}


def check_folder(checkpoint: Checkpoint) -> None:
    """Raise UserError for a local folder without a model and its weights; read no weight."""
    folder = Path(checkpoint.name)
    if not folder.exists():
        return
    if (folder / ADAPTER).is_file():
        raise UserError(
            str(checkpoint),
            f"it holds an adapter ({ADAPTER}), which cannot be pruned",
            "Merge it into the model with peft's merge_and_unload, or move the file away",
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            str(checkpoint),
            "the folder holds no config.json",
            "Name one that save_pretrained wrote",
        )
    for file in (*folder.glob("*"), *folder.glob("*/*")):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(str(checkpoint), f"{file} is a pipe or a device", "Remove it")
    files = [WEIGHTS]
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        with as_user_error(checkpoint, INDEX, "Download it again"):
            index = json.loads((folder / INDEX).read_text("utf-8"))
            files = sorted(set(index["weight_map"].values()))
            if outside := [file for file in files if Path(file).name != file]:
                raise ValueError(f"it names {outside[0]}, which is not a file of this folder")
    tensors = 0
    for file in files:
        if not (folder / file).is_file():
            raise UserError(
                str(checkpoint),
                f"its weights lack {file}, and only safetensors are read",
                CONVERT if [*folder.glob("*.bin")] else "Download it",
            )
        with as_user_error(checkpoint, file, "Download it again"):
            tensors += len(safe_open(folder / file, framework="pt").keys())
    layers = LAYER_COUNT.findall((folder / "config.json").read_bytes())
    if more := [number for number in map(int, layers) if number > tensors]:
        raise UserError(
            str(checkpoint),
            f"config.json declares {more[0]} layers, but the weight files have only "
            f"{tensors} tensors",
            "Download the model again",
        )


@cache
def local_only(checkpoint: Checkpoint) -> bool:
    """Return whether all files come from this machine: from a folder, or if the Hub is unreachable.

    Raises UserError if the Hub has no such model, or cannot be reached and there is no copy in the
    cache.
    """
    if Path(checkpoint.name).exists():
        return True
    try:
        HfApi().model_info(checkpoint.name, timeout=TIMEOUT)
        return False
    except HFValidationError:
        problem = "no such folder exists, and it is not a Hub id"
        raise UserError(str(checkpoint), problem, "Give owner/name or a folder") from None
    except Exception as error:
        cached = try_to_load_from_cache(checkpoint.name, "config.json", checkpoint.cache_dir)
        problem = hub_problem(error, "model")
        if problem is None:
            raise
        if isinstance(error, RepositoryNotFoundError) or not isinstance(cached, str):
            raise UserError(str(checkpoint), *problem) from error
        return True


def quantization(load_bit: str | None, skipped: list[str]) -> dict:
    """Return arguments for `from_pretrained` under `--load_bit`: all except `skipped` in 4 or 8."""
    if load_bit is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=load_bit == "4",
        load_in_8bit=load_bit == "8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=skipped,
    )
    return {"quantization_config": config}


@contextmanager
def as_user_error(checkpoint: Checkpoint, what: str, fix: str) -> Iterator[None]:
    """Convert exceptions to UserError: `what` cannot be loaded, the reason, and the fix."""
    try:
        yield
    except (UserError, PackedError, MemoryError):
        raise
    except Exception as error:  # safetensors and tokenizers raise direct children of Exception
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if "negative dimension" in str(error):  # transformers leaves 1.2 GiB of a device free
            raise MemoryError("the device has less than 1.2 GiB") from error
        if "trust_remote_code" in str(error) and not checkpoint.trust_remote_code:
            what = f"{what}, which needs custom code,"
            fix = "Give --trust_remote_code to run that code, if you trust it"
        if isinstance(error, OSError) and "file named" in str(error) and WEIGHTS in str(error):
            fix = CONVERT
        problem = f"{what} cannot be loaded ({first_line(error)})"
        raise UserError(str(checkpoint), problem, fix) from error


def check_complete(checkpoint: Checkpoint, info: dict) -> None:
    """Raise UserError if `from_pretrained` reports missing weights or mismatched shapes.

    Warns of unused weights.
    """
    missing, misfits = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise UserError(
            str(checkpoint),
            f"its weights lack {len(missing)} tensors, such as {missing[0]}",
            "Download it again, or correct its config.json",
        )
    if misfits:
        tensor, stored, expected = misfits[0]
        raise UserError(
            str(checkpoint),
            f"{tensor} is {list(stored)} in its weights, but {list(expected)} according to "
            "config.json",
            "Download the model again",
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        log.warning("%s: %d tensors are not used, such as %s", checkpoint, len(unused), unused[0])


def stored_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {name of a tensor: the file that holds it} of a local checkpoint, else {}."""
    names: dict[str, str] = {}
    for file in sorted(Path(checkpoint.name).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            names |= dict.fromkeys(stored.keys(), str(file))
    return names


def weight_bytes(folder: str | Path) -> int:
    """Return the bytes of a local folder's weight files; 0 for a model on the Hub."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def tensor_bytes(file: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
