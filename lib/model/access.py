"""What can go wrong between a model's name and its weights, in_one_line in one line.

The hub is asked once, with a short time limit: transformers' own attempts take half a minute to
fail. Where it can't be reached, a copy in the cache is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open

from lib.util.errors import UserError

TIMEOUT = 10.0  # seconds for the hub's answer
log = logging.getLogger(__name__)


def check_folder(name: str) -> None:
    """UserError where `name` can only be a local folder, but is no model's."""
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"--model {name}: is a file; name the folder that holds it")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(
            f"--model {name}: the folder holds no config.json, so it is not a model; "
            "name one that save_pretrained wrote"
        )
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"--model {name}: there is no such folder; check the path")


def check_weight_files(name: str) -> None:
    """UserError where a local folder's weight files are missing or cut short; reads no weight."""
    folder = Path(name)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (folder / files[0]).is_file():
        with in_one_line(name, index.name, "download it again"):
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise UserError(
                f"--model {name}: its weights are incomplete, there is no {file}; weights are read "
                "from safetensors only, download or convert them"
            )
        with in_one_line(name, file, "it is damaged or cut short; download it again"):
            safe_open(folder / file, framework="pt").keys()


@cache
def local_only(name: str, cache_dir: str) -> bool:
    """Whether files of `name` come from this machine alone: a folder, or the hub is out of reach.

    Raises UserError where the hub has no such model, or can't be reached and no copy is in
    `cache_dir`.
    """
    if Path(name).exists():
        return True
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except HFValidationError:
        raise UserError(f"--model {name}: no such folder, nor a hub id like owner/name") from None
    except GatedRepoError as error:
        raise UserError(
            f"--model {name}: its owners give access on request; accept their terms on the hub, "
            "then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--model {name}: no such folder, and no such model on the hub, or it needs a login "
            "(`hf auth login`); check the name"
        ) from error
    except HfHubHTTPError as error:
        if not _cached(name, cache_dir):
            raise UserError(
                f"--model {name}: the hub refused: {first_line(error)}; try again later"
            ) from error
        return True
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        if not _cached(name, cache_dir):
            raise UserError(
                f"--model {name}: no such folder, none in --cache_dir {cache_dir}, and the hub "
                f"can't be reached ({first_line(error)}); check the name and the network"
            ) from error
        return True
    return False


def access(name: str, cache_dir: str, trust_remote_code: bool) -> dict:
    """How `from_pretrained` may come by the files of `name`."""
    known = dict(cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    return known | {"local_files_only": local_only(name, cache_dir)}


def quantisation(load_bit: str | None) -> dict:
    """What `from_pretrained` is told of `--load_bit`: `4`, `8` or None."""
    if load_bit is None:
        return {}
    from transformers import BitsAndBytesConfig

    kind = BitsAndBytesConfig(
        load_in_4bit=load_bit == "4",
        load_in_8bit=load_bit == "8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    return {"quantization_config": kind}


@contextmanager
def in_one_line(name: str, what: str, way_out: str) -> Iterator[None]:
    """Inside, whatever is raised becomes a UserError: `what` can't be loaded, why, the way out."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # safetensors and tokenizers raise direct children of Exception
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UserError(
            f"--model {name}: {what} can't be loaded ({first_line(error)}); {way_out}"
        ) from error


def check_complete(name: str, info: dict) -> None:
    """UserError where `from_pretrained`'s report says that weights are missing or do not fit.

    Warns of weights that are not used.
    """
    missing, misfits = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise UserError(
            f"--model {name}: {len(missing)} tensors are missing from its weights, the first is "
            f"{missing[0]}; download it again, or mend its config.json"
        )
    if misfits:
        tensor, found, wanted = misfits[0]
        raise UserError(
            f"--model {name}: {tensor} is {list(found)} in its weights, but {list(wanted)} by its "
            "config.json; these do not belong together"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        log.warning("--model %s: %d tensors are not used: %s ...", name, len(unused), unused[0])


def first_line(error: BaseException) -> str:
    """Of an error's message, without its final punctuation; its class where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:, ")[:300]


def _cached(name: str, cache_dir: str) -> bool:
    return isinstance(try_to_load_from_cache(name, "config.json", cache_dir=cache_dir), str)


def weight_files(name: str) -> dict[str, list[int]]:
    """Size in bytes and time of change (ns) of a local model's weight files."""
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
