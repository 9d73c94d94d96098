"""Loads and saves a model with its config and tokenizer, and finds its decoder blocks."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from lib.data.tokenizer import keep_limits, template_texts
from lib.model.access import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    as_user_error,
    check_complete,
    check_folder,
    quantisation,
    stored_names,
)
from lib.model.dtypes import SaveDtypes
from lib.model.quantised import keep_bnb_layout
from lib.packed.linear import semi_structured_bytes
from lib.util.errors import UserError

LONGEST_WINDOW = 4096  # tokens, where neither a flag nor the model says less
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192  # in one forward pass, roughly
NARROW = 4096  # width below which that many tokens do not keep a GPU busy
MOST_TENSORS = 10  # parameters of a model for each tensor in its weights, far above any kind's
MOST_WEIGHTS = 16  # numbers for each byte in its weights


def pick_device(name: str | None) -> torch.device:
    """Return the device of `--device`, by default the first GPU if there is one, else the CPU.

    Raises UserError if this machine does not have it.
    """
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device; use cuda:0 or cpu") from None
    if device.type == "cpu":
        return device
    if device.type == "mps":
        raise UserError(f"--device {name}: has no float64, which sums need; use --device cpu")
    here = torch.accelerator.current_accelerator()
    if here is None or here.type != device.type or not torch.accelerator.is_available():
        raise UserError(f"--device {name}: no such device was found; use --device cpu")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: devices here are {device.type}:0 to {device.type}:{count - 1}"
        )
    return torch.device(device.type, device.index or 0)


def set_current_device(device: torch.device) -> None:
    """Make `device` the default for calls that name none, and products on it exact."""
    if device.type != "cpu":
        # read when cuBLAS starts: without it products need not add up in the same order twice
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # an environment may ask for TF32
        torch.accelerator.set_device_index(device.index)


def load_config(checkpoint: Checkpoint) -> Any:
    """Load the model's config, before any weight. Raises UserError if it can't be loaded."""
    check_folder(checkpoint)
    way_out = "check that file and the installed transformers"
    with as_user_error(checkpoint, "its config.json", way_out):
        config = AutoConfig.from_pretrained(checkpoint.name, **checkpoint.options())
    if not checkpoint.trust_remote_code:
        vars(config).pop("auto_map", None)  # names code that is not saved with the model
    return config


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the model's tokenizer. Raises UserError if it has none that works."""
    with as_user_error(checkpoint, "its tokenizer", "put the tokenizer's files beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **checkpoint.options())
        template_texts(tokenizer, str(checkpoint))  # which checks them
        keep_limits(tokenizer)
    if not tokenizer("a").input_ids and not tokenizer("text").input_ids:
        raise UserError(f"{checkpoint}: its tokenizer turns text into no tokens")
    return tokenizer


def window_length(config, requested: int | None, longest: int = LONGEST_WINDOW) -> int:
    """Return the tokens in a window: as requested, else the model's limit, at most `longest`."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((n for n in (getattr(text, a, None) for a in names) if n), None)
    if requested is None:
        return min(limit or longest, longest)
    if limit and requested > limit:
        raise UserError(f"--seqlen {requested}: the model's window ends at {limit} tokens")
    return requested


def default_batch_size(device: torch.device, seqlen: int, width: int) -> int:
    """Return the windows per forward pass that keep the device busy without much memory."""
    tokens = BATCH_TOKENS
    if device.type != "cpu":
        tokens = GPU_BATCH_TOKENS * max(1, NARROW / width)  # as many activations as at that width
    return max(1, int(tokens) // seqlen)


def checkpoint_dtype(config) -> torch.dtype:
    """Return the dtype that the checkpoint's config names; float32 if it names none."""
    dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def pick_dtype(name: str, config, device: torch.device) -> torch.dtype:
    """Return the working dtype.

    `auto` is the checkpoint's where the device multiplies it by itself, else float32: on a GPU that
    would emulate bfloat16, and on a CPU but for bfloat16 with AMX's or AVX-512's instructions.
    """
    if name != "auto":
        return DTYPES[name]
    dtype, fast = checkpoint_dtype(config), True
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch allowed
        fast = dtype == torch.bfloat16 and (able.get("amx_bf16") or able.get("avx512_bf16"))
    elif device.type == "cuda" and dtype == torch.bfloat16:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype if fast else torch.float32


def saved_dtype(name: str, config, narrows: bool = False) -> torch.dtype:
    """Return the dtype in which a changed model is saved; `auto` is the checkpoint's.

    `narrows`: bfloat16 in place of float32.
    """
    dtype = checkpoint_dtype(config) if name == "auto" else DTYPES[name]
    return torch.bfloat16 if narrows and dtype == torch.float32 else dtype


def skeleton(config: Any, checkpoint: Checkpoint | None = None) -> nn.Module:
    """Build the model without weights, on the meta device.

    Raises UserError where it can't be built, or is far larger than a local folder's weights.
    """
    checkpoint = checkpoint or Checkpoint(getattr(config, "name_or_path", "?"))
    stored = stored_names(checkpoint)
    n_bytes = sum(map(os.path.getsize, set(stored.values())))
    tensors, weights = MOST_TENSORS * len(stored), MOST_WEIGHTS * n_bytes

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors, weights
        tensors, weights = tensors - 1, weights - parameter.numel()
        if stored and min(tensors, weights) < 0:
            raise UserError(
                f"{checkpoint}: its config.json describes a far larger model than its weights, "
                f"{len(stored)} tensors in {n_bytes} bytes; these do not belong together"
            )

    with (
        as_user_error(checkpoint, "a model of its kind", "name a causal language model"),
        register_module_parameter_registration_hook(on_parameter),
        torch.device("meta"),
    ):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=checkpoint.trust_remote_code
        )


def set_field(config: Any, field: str, value: int) -> None:
    """Set a field of a model's text config."""
    setattr(config.get_text_config(decoder=True), field, value)


def skeleton_with(config: Any, field: str, value: int, checkpoint: Checkpoint) -> nn.Module | None:
    """Build the model without weights, with another value in a field of its text config.

    Returns None where it can't be built so.
    """
    changed = copy.deepcopy(config)
    set_field(changed, field, value)
    try:
        return skeleton(changed, checkpoint)
    except Exception:  # any model's class may reject the value in its own way
        return None


def load_model(
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: torch.dtype,
    device_map: dict[str, object],
    offload: str | None = None,
    load_bit: str | None = None,
) -> nn.Module:
    """Load the model in eval mode by `device_map`. Raises UserError if weights are damaged."""
    checkpoint = checkpoint.pinned(config)
    way_out = "are they complete? download them again; where memory is short, --offload FOLDER"
    with as_user_error(checkpoint, "its weights", way_out):
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.name,
            config=config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **checkpoint.options(),
            **quantisation(load_bit),
        )
    check_complete(checkpoint, info)
    if getattr(model, "is_quantized", False):
        keep_bnb_layout(model)
        # the other weights of a quantised checkpoint keep their stored dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def fresh_copy(dense: nn.Module) -> nn.Module:
    """Return a copy of a model that may be changed freely.

    The weights outside its blocks, which no run writes into, share memory with `dense` until they
    are moved or cast.
    """
    _, blocks = decoder_blocks(dense)
    written = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False)
        for p in dense.parameters()
        if id(p) not in written
    }
    return copy.deepcopy(dense, memo)


def save_model(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write the model into `folder` in `dtype`, as safetensors.

    Modules that the architecture always keeps in float32 (some routers) stay so. The model's own
    dtypes are restored afterwards.
    """
    with cast(model, dtype):
        model.save_pretrained(folder, max_shard_size="5GB")


def save_in_shards(
    model: nn.Module, folder: Path, dtype: torch.dtype, shards: dict[Path, list[str]]
) -> dict[str, str] | None:
    """As `save_model`, but the files of finished blocks, {file: names}, become its shards.

    They stay where they are, too: on the same disk that takes no room. Returns {file: its name in
    the folder}; None, having written nothing, where the names in a checkpoint of this model differ
    from those in the files.
    """
    inside = {name for each in shards.values() for name in each}
    held = {name: each.to("meta") for name, each in model.state_dict().items() if name in inside}
    if (
        getattr(model, "hf_quantizer", None)
        or revert_weight_conversion(model, held).keys() != inside
    ):
        return None
    with cast(model, dtype):
        rest = {name: value for name, value in model.state_dict().items() if name not in inside}
        model.save_pretrained(folder, state_dict=rest)
    count = len(shards) + 1
    weight_map, size, moved = {}, 0, {}
    for number, file in enumerate([folder / WEIGHTS, *shards], 1):
        shard = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        try:
            os.link(file, shard)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file, shard)
        moved[str(file)] = shard.name
        with safe_open(shard, "pt") as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
        size += shard.stat().st_size
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return moved


@contextmanager
def cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the model's floating-point parameters have the dtype in which they are saved.

    Afterwards they have their own again, with values that were rounded to it.
    """
    saved = SaveDtypes(model, dtype)
    before = {parameter: parameter.dtype for parameter in model.parameters()}
    config_dtype = model.config.dtype
    try:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(saved.of(name, parameter))
        model.config.dtype = dtype
        yield
    finally:
        model.config.dtype = config_dtype
        for parameter, working in before.items():
            if parameter.dtype != working:
                parameter.data = parameter.data.to(working)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder blocks: the ModuleList of classes in `_no_split_modules`.

    If there are several (a multimodal model), it is the one inside the language part.
    """
    classes = set(model._no_split_modules or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(child).__name__ in classes for child in module)
    ]
    if len(lists) > 1 and isinstance(model.get_decoder(), nn.Module):
        inside = set(model.get_decoder().modules())
        lists = [(name, module) for name, module in lists if module in inside]
    if len(lists) != 1:
        raise UserError(
            f"--model {model.name_or_path} ({type(model).__name__}): "
            f"{len(lists) or 'no'} lists of decoder blocks "
            f"({', '.join(sorted(classes)) or 'the model names no block class'}) were found where "
            "one is needed; this architecture can't be pruned"
        )
    return lists[0]


def footprint(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers on any device, shared ones counted once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in tensors) + semi_structured_bytes(model)


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the parameters saved in `dtype`, shared ones counted once."""
    saved = SaveDtypes(model, dtype)
    return sum(one.numel() * saved.of(name, one).itemsize for name, one in model.named_parameters())


def default_bos_id(tokenizer) -> int | None:
    """Return the BOS id if the tokenizer adds it to every text by default, else None."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a").input_ids[:1]
    return bos if bos is not None and first == [bos] else None
