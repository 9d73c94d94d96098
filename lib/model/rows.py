"""The rows of a model's embedding and head, one for each token, and the token ids in its configs.

The config of a trimmed model holds, as `vocabulary_trimmed_from`, how many rows it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from lib.model.access import Checkpoint
from lib.util.errors import UserError
from lib.util.token_ids import NAMES, find_token_ids, map_token_ids

TRIMMED_FROM = "vocabulary_trimmed_from"


def trimmable_rows(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Return the number of rows of the embedding; messages name the `checkpoint`.

    Raises UserError if anything but the embedding and the head depends on that number, so that
    removing rows would break the model. Needs no weights.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _refused(checkpoint, f"an embedding of the class {type(embedding).__name__}")
    if not isinstance(head, nn.Linear):
        raise _refused(checkpoint, f"an output head of the class {type(head).__name__}")
    rows = embedding.num_embeddings
    if head.out_features != rows or head.weight.shape[0] != rows:
        raise _refused(checkpoint, f"{rows} rows in its embedding, {head.out_features} in its head")
    trimmed = {(embedding, "weight"), (head, "weight"), (head, "bias")}
    sizes = {rows} | {
        value
        for fields in _nested(model.config)
        for key, value in vars(fields).items()
        if "vocab" in key and key != TRIMMED_FROM and isinstance(value, int) and value > 1
    }
    for path, module in model.named_modules():
        tensors = (*module.named_parameters("", False), *module.named_buffers("", False))
        for attribute, tensor in tensors:
            is_table = isinstance(module, nn.Embedding) and sizes.intersection(tensor.shape[:1])
            if (module, attribute) not in trimmed and (rows in tensor.shape or is_table):
                full_name, shape = f"{path}.{attribute}".strip("."), list(tensor.shape)
                problem = f"a tensor {full_name} {shape}, which depends on its vocabulary"
                raise _refused(checkpoint, problem)
    return rows


def _refused(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(
        f"--trim_vocabulary: {checkpoint} has {what}; the vocabulary of this architecture can't "
        "be trimmed, leave the flag out"
    )


def _nested(config: Any) -> Iterator[Any]:
    """Yield a config and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _nested(value)


def config_token_ids(checkpoint: Checkpoint, config: Any) -> set[int]:
    """Return the token ids in a model's config and in its generation config, if it has one."""
    ids = find_token_ids(config.to_dict())
    options = checkpoint.options()
    options.pop("trust_remote_code")
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.name, **options)
    except OSError:  # the model has none
        return ids
    return ids | find_token_ids(generation.to_dict())


@torch.no_grad()
def keep_rows_(model: nn.Module, rows: Tensor) -> None:
    """Replace embedding and head of `model` by their `rows` (tokens,), in this order.

    All token ids in its configs and modules follow; tied weights stay tied. Raises UserError if
    embedding or head is quantised.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before, after = embedding.num_embeddings, len(rows)
    tied = head.weight is embedding.weight
    for module in (embedding,) if tied else (embedding, head):
        if not module.weight.is_floating_point():
            raise UserError(
                f"--trim_vocabulary: the model's {type(module).__name__} of its vocabulary is "
                f"quantised to {module.weight.dtype}; trim the model that it was made of"
            )
        module.weight = _select_rows(module.weight, rows)
    if tied:
        head.weight = embedding.weight
    if head.bias is not None:
        head.bias = _select_rows(head.bias, rows)
    embedding.num_embeddings = head.out_features = after
    new_ids = {index: place for place, index in enumerate(rows.tolist())}
    _renumber_(model, new_ids, before, after)


def _select_rows(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    selected = parameter.data.index_select(0, rows.to(parameter.device))
    return nn.Parameter(selected, requires_grad=parameter.requires_grad)


def _renumber_(model: nn.Module, new_ids: Mapping[int, int], before: int, after: int) -> None:
    """Update every token id, and the vocabulary's size, in configs and modules of `model`."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            configs |= {id(each): each for each in _nested(config)}
        fields = {k: v for k, v in vars(module).items() if NAMES.fullmatch(k)}
        _map_fields_(module, fields, new_ids)
        if module.__dict__.get("vocab_size") == before:
            module.vocab_size = after
    size = model.config.get_text_config(decoder=True).vocab_size
    for config in configs.values():
        fields = {k: v for k, v in vars(config).items() if not isinstance(v, PretrainedConfig)}
        _map_fields_(config, fields, new_ids)
        if getattr(config, "vocab_size", None) in (before, size):
            config.vocab_size = after
    original = getattr(model.config, TRIMMED_FROM, None) or before
    setattr(model.config, TRIMMED_FROM, original)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        _map_fields_(generation, dict(vars(generation)), new_ids)


def _map_fields_(holder: Any, fields: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    for key, value in map_token_ids(fields, lambda index: new_ids.get(index, index)).items():
        if value != fields[key]:
            setattr(holder, key, value)
