"""A model whose vocabulary `trim` has made smaller: its list of tokens, and the whole as teacher.

The list is vocabulary.json in the model's folder, and says which row of the original each row is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from ..model.checkpoint import Checkpoint, as_user_error
from ..model.pretrained import load_tokenizer
from ..util.errors import UserError
from ..util.files import write_text
from ..vocabulary.tables import TRIMMED_FROM

if TYPE_CHECKING:
    from .run import Model

LIST = "vocabulary.json"
OTHER_TEACHER = "Name the dense model that it was made from"
NOTE = (
    "The vocabulary was trimmed: fewer tokens share the probability, so perplexity falls by "
    "itself. Compare with other vocabularies by bits per byte."
)


def read_list(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """Return the list of a trimmed model, or {} if it has none."""
    if not getattr(config, TRIMMED_FROM, None):
        return {}
    options = checkpoint.options() | {"_raise_exceptions_for_missing_entries": False}
    options.pop("trust_remote_code")
    with as_user_error(checkpoint, LIST, "Trim the model again"):
        file = cached_file(checkpoint.name, LIST, **options)
        return dict(json.loads(Path(file).read_text("utf-8"))) if file else {}


def write_list(model: Model, folder: Path) -> None:
    """Write the list of a trimmed model, if it has one, beside a model made from it."""
    if model.listed:
        write_text(folder / LIST, json.dumps(model.listed, ensure_ascii=False))


def vocabulary_record(model: Model) -> dict[str, Any] | None:
    """Return what results.json has of a trimmed vocabulary; None for a whole one."""
    before = getattr(model.config, TRIMMED_FROM, None)
    if not before:
        return None
    rows = model.config.get_text_config(decoder=True).vocab_size
    record = model.listed.get("record", {})
    more = {key: record[key] for key in ("digest", "model") if record.get(key)}
    return {"note": NOTE, "rows": rows, "rows_before": before} | more


def teacher_rows(model: Model, teacher: Checkpoint, rows: int) -> list[int] | None:
    """Return the row of the teacher for each one of the model; None if they are the same.

    `rows` is the number of the teacher's. The model's list says it, or the names of its tokens if
    each row has one. Raises UserError if the teacher lacks tokens of the model.
    """
    own, others = model.tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    count = model.skeleton.get_input_embeddings().num_embeddings
    if own == others and count == rows:
        return None
    places = {place: token for token, place in own.items()}
    by_name = [others.get(places.get(place)) for place in range(count)]
    ids, found = (model.listed.get(name, []) for name in ("ids", "rows"))
    is_of_list = len(found) == count and by_name[: len(ids)] == ids and len(own) == len(ids)
    found = found if is_of_list else by_name
    if None in found or max(found) >= rows or max(own.values()) >= count:
        problem = f"its vocabulary differs from that of {model.checkpoint}"
        if not model.listed and rows > count:
            problem += f", which has no {LIST} of trim"
        raise UserError(str(teacher), problem, OTHER_TEACHER)
    return found


@torch.no_grad()
def predict_rows_(model: nn.Module, rows: Sequence[int]) -> None:
    """Let a whole model read and predict a trimmed one's ids: places in `rows`, which are its own.

    Its embedding stays whole, since its code and other tables may depend on its own ids.
    """
    head = model.get_output_embeddings()
    kept = torch.tensor(rows, device=head.weight.device)

    def with_own_ids(_: nn.Module, args: tuple, options: dict[str, Any]) -> tuple:
        ids: Tensor = options["input_ids"]
        return args, options | {"input_ids": kept.to(ids.device)[ids]}

    model.register_forward_pre_hook(with_own_ids, with_kwargs=True)
    for name, weight in [*head.named_parameters(recurse=False)]:
        setattr(head, name, nn.Parameter(weight.index_select(0, kept), requires_grad=False))
    head.out_features = len(rows)
    model.config.get_text_config(decoder=True).vocab_size = len(rows)
