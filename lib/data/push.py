"""Upload of a built data set to the Hugging Face hub, never without a yes."""

from __future__ import annotations

import json
from pathlib import Path

from lib.data.ubertext import RECORD, SPLITS
from lib.util.errors import UserError


def check_login(repo: str) -> None:
    """UserError where nobody is logged in, before hours of work rather than after."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(f"--push {repo}: not logged in to the hub; run `hf auth login` first")


def push(folder: Path, repo: str) -> bool:
    """Ask, then upload the folder's splits and record; False where the answer is no.

    A repository that does not exist is created private: whether the texts may be published is the
    user's to decide.
    """
    facts = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    files = [f"{split}.jsonl" for split in SPLITS]
    size = sum((folder / name).stat().st_size for name in files) / 2**20
    rows = ", ".join(f"{facts[split]['rows']} {split} rows" for split in SPLITS)
    try:
        answer = input(f"Upload {rows} ({size:.1f} MiB) to the data set {repo}? [y/N] ")
    except EOFError:  # nobody there to ask
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("not uploaded")
        return False
    _upload(folder, repo, [*files, RECORD])
    print(f"uploaded to https://huggingface.co/datasets/{repo}")
    return True


def _upload(folder: Path, repo: str, files: list[str]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    hub = HfApi()
    try:
        hub.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="dataset", allow_patterns=files
        )
    except (HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--push {repo}: the upload failed ({reason}); the files are in {folder}, "
            "the same command tries again"
        ) from error
