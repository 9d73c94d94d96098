"""The rows of a model's embedding and head, one per token, and the token ids in its configs.

Some models have more tables with a row per token, such as Gemma 3n's embeddings for each layer.
The config of a trimmed model holds its original number of rows as `vocabulary_trimmed_from`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from ..data.token_ids import find_token_ids, map_token_ids
from ..util.errors import UserError
from ..util.quirks import TOKEN_ID_FIELDS
from .blocks import Stop
from .checkpoint import Checkpoint

TRIMMED_FROM = "vocabulary_trimmed_from"
READ_TOKENS = 1024  # looked up at a time, to find the rows that a model reads


def trimmable_rows(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Return the number of rows of the embedding; messages name the `checkpoint`.

    Raises UserError if anything except the embedding, the head and `token_tables` depends on that
    number, so that removing rows would break the model. Needs no weights.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _unsupported(checkpoint, f"an embedding of the class {type(embedding).__name__}")
    if not isinstance(head, nn.Linear):
        raise _unsupported(checkpoint, f"an output head of the class {type(head).__name__}")
    rows = embedding.num_embeddings
    if head.out_features != rows or head.weight.shape[0] != rows:
        raise _unsupported(
            checkpoint, f"{rows} rows in its embedding, {head.out_features} in its head"
        )
    trimmed = {(table, "weight") for table in (embedding, head, *token_tables(model))}
    trimmed.add((head, "bias"))
    sizes = {rows}.union(*map(_vocabulary_sizes, _nested(model.config)))
    for path, module in model.named_modules():
        tensors = (*module.named_parameters("", False), *module.named_buffers("", False))
        for attribute, tensor in tensors:
            is_table = isinstance(module, nn.Embedding) and sizes.intersection(tensor.shape[:1])
            if (module, attribute) not in trimmed and (rows in tensor.shape or is_table):
                full_name, shape = f"{path}.{attribute}".strip("."), list(tensor.shape)
                problem = f"a tensor {full_name} {shape}, which depends on its vocabulary"
                raise _unsupported(checkpoint, problem)
    return rows


def token_tables(model: nn.Module) -> list[nn.Embedding]:
    """Return the other embeddings whose number of rows equals a vocabulary size.

    They may have fewer rows than the input's. Only a pass shows whether tokens choose the rows.
    """
    sizes = _vocabulary_sizes(model.config.get_text_config(decoder=True))
    others = (module for module in model.modules() if module is not model.get_input_embeddings())
    return [m for m in others if isinstance(m, nn.Embedding) and m.num_embeddings in sizes]


def _vocabulary_sizes(config: Any) -> set[int]:
    """Return the vocabulary sizes in a config's own fields."""
    return {
        value
        for key, value in vars(config).items()
        if "vocab" in key and key != TRIMMED_FROM and isinstance(value, int) and value > 1
    }


def _unsupported(checkpoint: Checkpoint | str, what: str) -> UserError:
    return UserError(
        "--trim_vocabulary",
        f"{checkpoint} has {what}, so its vocabulary cannot be trimmed",
        "Leave the flag out",
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
    except OSError:  # the model has no such config
        return ids
    return ids | find_token_ids(generation.to_dict())


@torch.no_grad()
def keep_rows_(model: nn.Module, rows: Tensor) -> None:
    """Replace embedding and head of `model` by their `rows` (tokens,), in this order.

    Updates all `token_tables` and all token ids in its configs and modules; tied weights stay tied.
    Raises UserError if a table is quantized, or has other inputs than tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables, after, tied = token_tables(model), len(rows), head.weight is embedding.weight
    read = _rows_read(model, tables, rows)
    sizes = {table.num_embeddings for table in (embedding, *tables)}
    original = getattr(model.config, TRIMMED_FROM, None) or embedding.num_embeddings
    setattr(model.config, TRIMMED_FROM, original)
    for module, chosen in zip((embedding, *tables, head), (rows, *read, rows), strict=True):
        if not module.weight.is_floating_point():
            raise UserError(
                "--trim_vocabulary",
                f"the vocabulary's {type(module).__name__} is quantized to {module.weight.dtype}",
                "Name the unquantized model",
            )
        for name, parameter in module.named_parameters(recurse=False):
            if tied and module is head and name == "weight":
                parameter = embedding.weight
            else:
                selected = parameter.data.index_select(0, chosen.to(parameter.device))
                parameter = nn.Parameter(selected, requires_grad=parameter.requires_grad)
            setattr(module, name, parameter)
        setattr(module, "out_features" if module is head else "num_embeddings", after)
    new_ids = {index: place for place, index in enumerate(rows.tolist())}
    _renumber_(model, new_ids, sizes, after)
    for old, new in zip(read, _rows_read(model, tables, torch.arange(after)), strict=True):
        if not torch.equal(old[new], old):
            raise _unsupported(f"--model {model.name_or_path}", "a table that trimming would break")


def _rows_read(model: nn.Module, tables: list[nn.Embedding], ids: Tensor) -> list[Tensor]:
    """Return the row of each table that the model reads for `ids` (tokens,): (tokens,) each.

    For tokens beyond a smaller table this is another token's row. The forward pass ends once all
    tables were read. Raises UserError if most tokens do not choose their own row.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # without weights only the shapes matter
        return [ids for _ in tables]
    read: dict[nn.Module, list[Tensor]] = {table: [] for table in tables}

    def see(table: nn.Module, args: tuple) -> None:
        read[table].append(args[0].flatten().cpu())
        if len(set(map(len, read.values()))) == 1:
            raise Stop

    with ExitStack() as hooks:
        for table in tables:
            hooks.enter_context(table.register_forward_pre_hook(see))
        for part in ids.split(READ_TOKENS) if tables else ():
            with suppress(Stop):
                model(input_ids=part[None].to(device), use_cache=False)
    read_rows = [torch.cat([ids[:0], *parts]) for parts in read.values()]
    for table, rows in zip(tables, read_rows, strict=True):
        chosen = rows.shape == ids.shape and (rows == ids).sum() > len(ids) // 2
        if not chosen or rows.max() >= len(table.weight):
            problem = f"a table of {list(table.weight.shape)} whose rows are not its tokens"
            raise _unsupported(f"--model {model.name_or_path}", problem)
    return read_rows


def _renumber_(model: nn.Module, new_ids: Mapping[int, int], sizes: set[int], after: int) -> None:
    """Update every token id, and the vocabulary's `sizes`, in configs and modules of `model`."""
    sizes = sizes | {model.config.get_text_config(decoder=True).vocab_size}
    holders = {id(module): module for module in model.modules()}
    for module in model.modules():
        for config in map(module.__dict__.get, ("config", "generation_config")):
            if config is not None:
                holders |= {id(each): each for each in _nested(config)}
    for holder in holders.values():
        fields = {k: v for k, v in vars(holder).items() if not isinstance(v, PretrainedConfig)}
        if isinstance(holder, nn.Module):
            names = (k for k in fields if TOKEN_ID_FIELDS.fullmatch(k) or "vocab_size" in k)
            fields = {name: fields[name] for name in names}
        changed = map_token_ids(fields, lambda index: new_ids.get(index, index))
        changed |= {k: after for k, v in fields.items() if "vocab_size" in k and v in sizes}
        for key, value in changed.items():
            if value != fields[key]:
                setattr(holder, key, value)
