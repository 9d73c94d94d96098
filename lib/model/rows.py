"""The rows of a model that stand for tokens: of its embedding and its head, and their numbers.

A trimmed model remembers in its config, as `vocabulary_trimmed_from`, how many rows it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from lib.model.access import Checkpoint
from lib.util.errors import UserError
from lib.util.token_ids import NAMES, named_ids, renumbered

TRIMMED_FROM = "vocabulary_trimmed_from"


def count_rows(model: nn.Module, checkpoint: Checkpoint) -> int:
    """How many tokens the model has rows for.

    UserError where anything else than its embedding and its head depends on their number, so that
    leaving some out would break it. Needs no weights.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _refused(checkpoint, f"an embedding of the class {type(embedding).__name__}")
    if not isinstance(head, nn.Linear):
        raise _refused(checkpoint, f"an output head of the class {type(head).__name__}")
    rows = embedding.num_embeddings
    if head.out_features != rows or head.weight.shape[0] != rows:
        raise _refused(checkpoint, f"{rows} rows in its embedding, {head.out_features} in its head")
    followed = {(embedding, "weight"), (head, "weight"), (head, "bias")}
    sizes = {rows, *_vocabulary_sizes(model.config)}
    for path, module in model.named_modules():
        tensors = (*module.named_parameters("", False), *module.named_buffers("", False))
        for own, tensor in tensors:
            another = isinstance(module, nn.Embedding) and sizes.intersection(tensor.shape[:1])
            if (module, own) not in followed and (rows in tensor.shape or another):
                where, shape = f"{path}.{own}".strip("."), list(tensor.shape)
                raise _refused(
                    checkpoint, f"a tensor {where} {shape}, which depends on its vocabulary"
                )
    return rows


def _refused(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(
        f"--trim_vocabulary: {checkpoint} has {what}; the vocabulary of this architecture can't "
        "be trimmed, leave the flag out"
    )


def _vocabulary_sizes(config: Any) -> Iterator[int]:
    for fields in _nested(config):
        for key, value in vars(fields).items():
            if "vocab" in key and key != TRIMMED_FROM and isinstance(value, int) and value > 1:
                yield value


def _nested(config: Any) -> Iterator[Any]:
    """A config and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _nested(value)


def tokens_of_configs(checkpoint: Checkpoint, config: Any) -> set[int]:
    """The tokens that the config of a model and its generation config name."""
    tokens = named_ids(config.to_dict())
    options = checkpoint.options()
    options.pop("trust_remote_code")
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.name, **options)
    except OSError:  # it has none
        return tokens
    return tokens | named_ids(generation.to_dict())


@torch.no_grad()
def keep_rows_(model: nn.Module, rows: Tensor) -> None:
    """Leave of the embedding and the head of `model` only `rows` (tokens,), in this order.

    All numbers of tokens in its configs and modules follow; what is tied stays tied. UserError
    where its embedding or head is quantised.
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
        module.weight = _chosen(module.weight, rows)
    if tied:
        head.weight = embedding.weight
    if head.bias is not None:
        head.bias = _chosen(head.bias, rows)
    embedding.num_embeddings = head.out_features = after
    new = {number: place for place, number in enumerate(rows.tolist())}
    _renumber_(model, new, before, after)


def _chosen(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    chosen = parameter.data.index_select(0, rows.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _renumber_(model: nn.Module, new: Mapping[int, int], before: int, after: int) -> None:
    """Every number of a token, and the vocabulary's size, in configs and modules of `model`."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            configs |= {id(one): one for one in _nested(config)}
        _move_(module, {k: v for k, v in vars(module).items() if NAMES.fullmatch(k)}, new)
        if module.__dict__.get("vocab_size") == before:
            module.vocab_size = after
    size = model.config.get_text_config(decoder=True).vocab_size
    for config in configs.values():
        plain = {k: v for k, v in vars(config).items() if not isinstance(v, PretrainedConfig)}
        _move_(config, plain, new)
        if getattr(config, "vocab_size", None) in (before, size):
            config.vocab_size = after
    first = getattr(model.config, TRIMMED_FROM, None) or before
    setattr(model.config, TRIMMED_FROM, first)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        _move_(generation, dict(vars(generation)), new)


def _move_(holder: Any, fields: dict[str, Any], new: Mapping[int, int]) -> None:
    for key, value in renumbered(fields, lambda number: new.get(number, number)).items():
        if value != fields[key]:
            setattr(holder, key, value)
