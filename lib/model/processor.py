"""The processor of a multimodal checkpoint: its files, and the tokens that it inserts."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..data.token_ids import find_token_ids
from .checkpoint import Checkpoint, as_user_error

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
FILES += ("audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja")
QUIET = dict(_raise_exceptions_for_missing_entries=False)


def processor_files(checkpoint: Checkpoint) -> dict[str, dict | str]:
    """Return {name: fields or text} of a checkpoint's processor and chat template files."""
    options, files = checkpoint.options() | QUIET, {}
    options.pop("trust_remote_code")
    for name in FILES:
        with as_user_error(checkpoint, name, "Download it again"):
            if file := cached_file(checkpoint.name, name, **options):
                text = Path(file).read_text("utf-8")
                files[name] = json.loads(text) if name.endswith(".json") else text
    return files


def processor_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids in the processor's files, and those that its code adds to texts.

    The code adds literals without letters, such as line breaks around an image. It also adds tokens
    with a reserved name, which occur in no text and no setting.
    """
    files = processor_files(checkpoint)
    fields = [tokenizer.init_kwargs, *(each for each in files.values() if isinstance(each, dict))]
    kinds = (getattr(transformers, each.get("processor_class") or "", None) for each in fields)
    modules = {sys.modules[kind.__module__] for kind in kinds if kind}
    ids, code = find_token_ids(files), "".join(map(inspect.getsource, modules))
    for text in (getattr(node, "value", None) for node in ast.walk(ast.parse(code))):
        if isinstance(text, str) and text.upper() == text.lower():
            ids.update(tokenizer(text, add_special_tokens=False).input_ids)
    return ids | {index for token, index in tokenizer.get_added_vocab().items() if token in code}


def copy_processor(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the processor's files into `folder`, unless they exist there."""
    for name, content in processor_files(checkpoint).items():
        if not (folder / name).exists():
            is_text = isinstance(content, str)
            text = content if is_text else json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text, "utf-8")
