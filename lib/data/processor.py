"""The processor of a checkpoint that also sees or hears: its files, the tokens that it writes."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from lib.model.access import Checkpoint, as_user_error
from lib.util.token_ids import find_token_ids, map_token_ids

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
FILES += ("audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja")
NUMBERED = re.compile(r"([^\d]*[^\W\d][^\d]*)\d")  # a token's text before its first number


def processor_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return {name: file} of what a checkpoint has beside its weights and its tokenizer."""
    options = checkpoint.options()
    options.pop("trust_remote_code")
    quiet = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    found = {name: cached_file(checkpoint.name, name, **quiet, **options) for name in FILES}
    return {name: Path(file) for name, file in found.items() if file}


def processor_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids in the processor's files, and of what its code writes beside texts.

    That is literals without letters, such as line breaks around a picture, and numbered tokens,
    such as `<row_2_col_3>` for a part of it, which no text has and no setting names.
    """
    ids, kinds = set(), {tokenizer.init_kwargs.get("processor_class")}
    for file in processor_files(checkpoint).values():
        if file.suffix == ".json":
            with as_user_error(checkpoint, file.name, "download it again"):
                fields = json.loads(file.read_text("utf-8"))
                ids |= find_token_ids(fields)
                kinds.add(fields.get("processor_class"))
    classes = [getattr(transformers, kind, None) for kind in kinds if kind]
    modules = {sys.modules[kind.__module__] for kind in classes if kind}
    code = "".join(map(inspect.getsource, modules))
    for text in (getattr(node, "value", None) for node in ast.walk(ast.parse(code))):
        if isinstance(text, str) and text.upper() == text.lower():
            ids.update(tokenizer(text, add_special_tokens=False).input_ids)
    numbered = ((NUMBERED.match(token), i) for token, i in tokenizer.get_added_vocab().items())
    return ids | {index for match, index in numbered if match and match[1] in code}


def copy_processor(checkpoint: Checkpoint, folder: Path, rows: Tensor | None) -> None:
    """Copy the processor's files into `folder`, where it lacks them.

    `rows` (rows,) holds the original id of each new one of a trimmed vocabulary.
    """
    new_ids = {old: new for new, old in enumerate([] if rows is None else rows.tolist())}
    for name, file in processor_files(checkpoint).items():
        if (folder / name).exists():
            continue
        text = file.read_text("utf-8")
        if new_ids and file.suffix == ".json":
            fields = map_token_ids(json.loads(text), lambda index: new_ids.get(index, index))
            text = json.dumps(fields, indent=2, ensure_ascii=False)
        (folder / name).write_text(text, "utf-8")
