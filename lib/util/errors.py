"""The exception that a user sees as a single line, and other errors in such a line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PACKAGE = __name__.partition(".")[0]  # lib in a checkout, langprune once installed
OUT_OF_MEMORY = "can't allocate memory", "_STATUS_ALLOC_FAILED"  # in errors of torch and cuBLAS
FIELD = re.compile(r"\{--(\w+)\}")
JOINERS = "\u200c\u200d"  # invisible, but needed for spelling in Persian and Indic scripts


class UserError(ValueError):
    """A mistake of the user or a fault of the environment, reported in one line.

    `what` is what is wrong: a flag with its value, a file, a layer. `problem` is a sentence about
    it and `fix` the way out, if there is one, both without a final period. `main.py` prints
    `what: problem. fix.` without a traceback (unless `--debug`) and exits with status 1.

    Where other front ends have their own word for a flag of main.py, a message names its field, as
    in "Give fewer {--nsamples}", and the front end says its word (`fields_named`).
    """

    def __init__(self, what: str, problem: str, fix: str) -> None:
        super().__init__(what, problem, fix)  # all three, so that another process can unpickle it
        self.name_fields("--", {})

    def name_fields(self, prefix: str, names: Mapping[str, str]) -> None:
        """Name each field by its word in `names`, or else by prefix and field."""
        self.what, self.problem, self.fix = (spelled(each, prefix, names) for each in self.args)

    def __str__(self) -> str:
        return f"{self.what}: {self.problem}." + f" {self.fix}." * bool(self.fix)

    def inside(self, place: str) -> UserError:
        """Return the same error, with the place where it was raised before `what`."""
        what, *rest = self.args
        return type(self)(f"{place}: {what}", *rest)


@contextmanager
def fields_named(prefix: str = "--", **names: str) -> Iterator[None]:
    """Let an error raised inside name fields by these words: `calibration_data="--data"`."""
    try:
        yield
    except UserError as error:
        error.name_fields(prefix, names)
        raise


def spelled(text: str, prefix: str = "--", names: Mapping[str, str] | None = None) -> str:
    """Return a text with a word for each field in it; by default main.py's flag."""
    return FIELD.sub(lambda it: (names or {}).get(it[1], prefix + it[1]), text)


class RunWarning(UserWarning):
    """Concerns the whole run, not the linear layers that are being pruned when it is raised."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without final punctuation, or its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:, ")[:300]


def counted(count: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def first_of(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def hub_problem(error: Exception, kind: str) -> tuple[str, str] | None:
    """Return `problem` and `fix` for an error of the Hub's client; None for any other.

    `kind` is the kind of the missing object: `model` or `dataset`.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        fix = "Accept their terms, then run `hf auth login`"
        return "its owners give access on request", fix
    if isinstance(error, RepositoryNotFoundError):
        fix = "Check the name, or log in with `hf auth login`"
        return f"no such {kind} is on the Hub, nor a local folder or file", fix
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused the request ({first_line(error)})", "Try again later"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):  # offline mode too
        local = "folder" if kind == "model" else "file or folder of texts"
        fix = f"Check the network, or give a local {local}"
        return f"the Hub cannot be reached ({first_line(error)})", fix
    return None


def describe_error(error: BaseException) -> str | None:
    """Return the message for a user; None if the error is a defect of the program."""
    torch, packed = sys.modules.get("torch"), sys.modules.get(f"{PACKAGE}.packed.errors")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(PACKAGE):
        return f"{error.name} is not installed. Run pip install -r requirements.txt."
    if isinstance(error, UserError | OSError) or (packed and isinstance(error, packed.PackedError)):
        return str(error)
    lacking = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    if isinstance(error, lacking) or any(word in str(error) for word in OUT_OF_MEMORY):
        return (
            f"out of memory ({first_line(error)}). Use --batch_size 1, a smaller --seqlen or "
            "--nsamples, or --offload_folder FOLDER; with --recover, --recover_optimizer adamw8bit "
            "or --recover_rank 16."
        )
    return None


def one_line(text: str) -> str:
    """Return a text on one line, without control, directional and invisible characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or c in JOINERS)
