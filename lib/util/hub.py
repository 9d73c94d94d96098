"""Errors of the Hugging Face hub's client in the words of one line, for models and data sets."""

from __future__ import annotations

from lib.util.errors import first_line


def hub_problem(error: Exception, kind: str) -> str | None:
    """Return what is wrong and the way out; None for an error that is not the hub's.

    `kind` is what was looked for: `model` or `data set`.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its owners give access on request; accept their terms, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such {kind} on the hub, or it needs a login (`hf auth login`), and no local "
            "folder or file of that name; check the name"
        )
    if isinstance(error, HfHubHTTPError):
        return f"the hub refused: {first_line(error)}; try again later"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):  # offline mode too
        local = "folder" if kind == "model" else "file or folder of texts"
        return (
            f"the hub can't be reached ({first_line(error)}); check the network, or give a local "
            f"{local}"
        )
    return None
