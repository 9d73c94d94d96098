"""Load and save a model with its config and tokenizer, and find its decoder blocks."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    core_model_loading,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import get_keys_to_not_convert

from ..data.tokenizer import keep_limits, template_texts
from ..packed.linear import semi_structured_bytes
from ..util.errors import UserError
from .access import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    as_user_error,
    check_complete,
    check_folder,
    quantization,
    stored_names,
    tensor_bytes,
)
from .linears import experts_implementation
from .matrix import SaveDtypes
from .quantized import stored_bits

LONGEST_WINDOW = 4096  # tokens, the default if the model has no lower limit
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192  # per forward pass, roughly
NARROW = 4096  # below this width that many tokens do not keep a GPU busy
MOST_TENSORS = 10  # parameters of a model per stored tensor, far above any architecture's
MOST_WEIGHTS = 16  # numbers per byte of stored weights


def pick_device(name: str | None) -> torch.device:
    """Return the device of `--device`, by default the first GPU if there is one, else the CPU.

    Raises UserError if this machine does not have it.
    """
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}", "the device is unknown", "Use cuda:0 or cpu") from None
    if device.type == "cpu":
        return device
    if device.type == "mps":
        raise UserError(f"--device {name}", "it lacks float64, which sums need", "Use --device cpu")
    here, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if here is None or here.type != device.type or (device.index or 0) >= count:
        problem = f"no such device was found (accelerators: {count})"
        raise UserError(f"--device {name}", problem, "Use --device cpu")
    return torch.device(device.type, device.index or 0)


def set_current_device(device: torch.device) -> None:
    """Make `device` the default for calls without a device, and float32 products on it exact."""
    if device.type != "cpu":
        # read when cuBLAS starts: without it sums in products may have another order each time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # an environment may ask for TF32
        torch.accelerator.set_device_index(device.index)


def load_config(checkpoint: Checkpoint) -> Any:
    """Load the model's config, but no weight. Raises UserError if it cannot be loaded."""
    check_folder(checkpoint)
    fix = "Check that file and the version of transformers"
    with as_user_error(checkpoint, "its config.json", fix):
        config = AutoConfig.from_pretrained(checkpoint.name, **checkpoint.options())
    if getattr(config, "is_encoder_decoder", False):
        problem = f"it is an encoder-decoder model ({config.model_type})"
        raise UserError(str(checkpoint), problem, "Name a causal language model")
    if not checkpoint.trust_remote_code:
        vars(config).pop("auto_map", None)  # names code that is not saved with the model
    return config


def auto_class(config: Any) -> type:
    """Return the class of transformers that loads a config's checkpoint in full.

    This is AutoModelForCausalLM, unless the config belongs to a vision-language model and the
    checkpoint's `architectures` do not name the language model's class.
    """
    causal, multimodal = (
        each._model_mapping.get(type(config), None)
        for each in (AutoModelForCausalLM, AutoModelForImageTextToText)
    )
    named = causal is not None and causal.__name__ in (config.architectures or ())
    return AutoModelForImageTextToText if multimodal and not named else AutoModelForCausalLM


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the model's tokenizer. Raises UserError if it has no working one."""
    with as_user_error(checkpoint, "its tokenizer", "Put the tokenizer's files beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **checkpoint.options())
        template_texts(tokenizer, str(checkpoint))  # also checks them
        keep_limits(tokenizer)
    if not tokenizer("a").input_ids and not tokenizer("text").input_ids:
        raise UserError(str(checkpoint), "its tokenizer gives no tokens", "Put a working one there")
    return tokenizer


def window_length(config, requested: int | None, longest: int = LONGEST_WINDOW) -> int:
    """Return the tokens in a window: as requested, else the model's limit, at most `longest`."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((n for n in (getattr(text, a, None) for a in names) if n), None)
    if requested is None:
        return min(limit or longest, longest)
    if limit and requested > limit:
        raise UserError(
            f"--seqlen {requested}", f"the model's limit is {limit} tokens", "Give less"
        )
    return requested


def default_batch_size(device: torch.device, seqlen: int, width: int) -> int:
    """Return the windows per forward pass that keep the device busy with moderate memory."""
    tokens = BATCH_TOKENS
    if device.type != "cpu":
        tokens = GPU_BATCH_TOKENS * max(1, NARROW / width)  # as many activations as at that width
    return max(1, int(tokens) // seqlen)


def checkpoint_dtype(config) -> torch.dtype:
    """Return the dtype that the checkpoint's config names; float32 if it names none."""
    return config.dtype or config.get_text_config(decoder=True).dtype or torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def pick_dtype(name: str, config, device: torch.device) -> torch.dtype:
    """Return the compute dtype.

    `auto` is the checkpoint's if the device supports it natively, else float32. A GPU may only
    emulate bfloat16; a CPU supports only bfloat16, with AMX or AVX-512 instructions.
    """
    if name != "auto":
        return DTYPES[name]
    dtype, fast = checkpoint_dtype(config), True
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest torch
        fast = dtype == torch.bfloat16 and (able.get("amx_bf16") or able.get("avx512_bf16"))
    elif device.type == "cuda" and dtype == torch.bfloat16:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype if fast else torch.float32


def saved_dtype(name: str, config, fake_quantizes: bool = False) -> torch.dtype:
    """Return the dtype in which a changed model is saved; `auto` is the checkpoint's.

    `fake_quantizes`: bfloat16 instead of float32.
    """
    dtype = checkpoint_dtype(config) if name == "auto" else DTYPES[name]
    return torch.bfloat16 if fake_quantizes and dtype == torch.float32 else dtype


def skeleton(config: Any, checkpoint: Checkpoint) -> nn.Module:
    """Build the model without weights, on the meta device.

    Its `unread` are the names of parameters and buffers that a text-only pass does not read. Raises
    UserError if it cannot be built, or is far larger than a local folder's weights.
    """
    stored = stored_names(checkpoint)
    n_bytes = sum(map(os.path.getsize, set(stored.values())))
    tensors, weights = MOST_TENSORS * len(stored), MOST_WEIGHTS * n_bytes

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors, weights
        tensors, weights = tensors - 1, weights - parameter.numel()
        if stored and min(tensors, weights) < 0:
            raise UserError(
                str(checkpoint),
                f"config.json describes a far larger model than its weights, {len(stored)} "
                f"tensors in {n_bytes} bytes",
                "Download the model again",
            )

    with (
        as_user_error(checkpoint, "a model of its kind", "Name a causal language model"),
        register_module_parameter_registration_hook(on_parameter),
        torch.device("meta"),
    ):
        model = auto_class(config).from_config(
            config, trust_remote_code=checkpoint.trust_remote_code
        )
    if config.get_text_config(decoder=True) is not config:
        model.unread = _unread(model.eval())
    return model


def _unread(model: nn.Module) -> frozenset[str]:
    """Return the names of tensors that a text-only pass of a model without weights does not read.

    If such a pass fails, these are all except the decoder, the embedding and the head.
    """
    read: set[int] = set()

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ != "__get__":  # reads of a dtype or a device
                read.update(map(id, tree_leaves((args, kwargs))))
            return func(*args, **(kwargs or {}))

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # with batched_mm no shape depends on values
        with (
            experts_implementation(model, "batched_mm"),
            fake,
            torch.device("meta"),
            torch.no_grad(),
            Reads(),
        ):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception:  # a model's class may raise any error
        parts = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
        read = {id(each) for part in parts for each in part.state_dict(keep_vars=True).values()}
    state = model.state_dict(keep_vars=True)
    return frozenset(name for name, each in state.items() if id(each) not in read)


def skeleton_with(config: Any, field: str, value: int, checkpoint: Checkpoint) -> nn.Module | None:
    """Build the model without weights, with another value in a field of its text config.

    Returns None if it cannot be built.
    """
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(decoder=True), field, value)
    try:
        return skeleton(changed, checkpoint)
    except Exception:  # a model's class may raise any error
        return None


def changed_shapes(model: nn.Module, other: nn.Module) -> dict[str, tuple[tuple, tuple]]:
    """Return {path: (shape, other shape)} of parameters and buffers whose shapes differ.

    The shape of a missing one is ().
    """
    ours, theirs = (
        {path: tuple(each.shape) for path, each in chain(m.named_parameters(), m.named_buffers())}
        for m in (model, other)
    )
    pairs = {path: (ours.get(path, ()), theirs.get(path, ())) for path in ours | theirs}
    return {path: (shape, new) for path, (shape, new) in pairs.items() if shape != new}


def load_model(
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: torch.dtype,
    device_map: dict[str, object],
    offload: str | None = None,
    writes: bool = True,
    load_bit: str | None = None,
) -> nn.Module:
    """Load the model in eval mode with `device_map`. Raises UserError if weights are damaged.

    Weights on disk that are converted on loading go to folder `offload`; only one of the ranks that
    share it `writes`.
    """
    checkpoint = checkpoint.pinned(config)
    fix = "Download them again or, if memory is short, give --offload_folder FOLDER"
    bare = skeleton(config, checkpoint)
    unread = getattr(bare, "unread", frozenset())
    skipped = [*get_keys_to_not_convert(bare), *{name.rpartition(".")[0] for name in unread}]
    # None: the stored dtype
    plan = bare._get_dtype_plan(dtype) | {f"^{re.escape(name)}$": None for name in unread}
    planned = mock.patch.object(type(bare), "_get_dtype_plan", lambda *_: plan)

    def mapped(weight: Tensor, name: str, folder: str, index: dict[str, Any]) -> dict[str, Any]:
        file = str(Path(folder, f"{name}.safetensors"))
        index[name] = {"safetensors_file": file, "weight_name": name}
        return index

    with ExitStack() as patched, as_user_error(checkpoint, "its weights", fix):
        patched.enter_context(planned)
        if not writes:
            patched.enter_context(mock.patch.object(core_model_loading, "offload_weight", mapped))
        model, info = auto_class(config).from_pretrained(
            checkpoint.name,
            config=config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **checkpoint.options(),
            **quantization(load_bit, skipped),
        )
    check_complete(checkpoint, info)
    model.unread = unread
    if getattr(model, "is_quantized", False):
        for module in model.modules():  # a CPU's repacking would round the scales
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # the other weights of a quantized checkpoint keep their stored dtype
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name not in unread:
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fresh_copy(model: nn.Module, with_blocks: bool = True) -> nn.Module:
    """Return a copy of a model that may be changed freely, or without weights in its blocks.

    Matrices outside the blocks, which no run changes, share memory with the model's until they are
    moved or cast. Vectors are copied, since they may be trained.
    """
    _, blocks = decoder_blocks(model)
    inside = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in inside and not with_blocks:
            value = torch.empty_like(tensor, device="meta")
        elif id(tensor) not in inside and tensor.dim() > 1:
            value = tensor.data
        else:
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copy.deepcopy(model, memo)


def text_alone(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Return transformers' text-only model with the text parts of a vision-language model.

    Raises UserError if there are no other parts, or transformers has no such class.
    """
    whole = model.config
    if stored_bits(whole) or not getattr(model, "unread", None):
        what = "is quantized" if stored_bits(whole) else "has no other parts"
        raise UserError("--text_only", f"{checkpoint} {what}", "Leave the flag out")
    decoder, config = model.get_decoder(), copy.deepcopy(whole.get_text_config(decoder=True))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config.tie_word_embeddings = head.weight is embedding.weight
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocabulary_trimmed_from"):
        if getattr(config, name, None) is None and getattr(whole, name, None) is not None:
            setattr(config, name, getattr(whole, name))
    with torch.device("meta"):
        known = type(config) in AutoModelForCausalLM._model_mapping
        alone = AutoModelForCausalLM.from_config(config) if known else None
    if type(getattr(alone, "base_model", None)) is not type(decoder):
        what = f"for only the text of {checkpoint} ({type(decoder).__name__})"
        raise UserError("--text_only", f"transformers has no class {what}", "Leave the flag out")
    setattr(alone, alone.base_model_prefix, decoder)
    alone.set_output_embeddings(head)
    alone.generation_config, alone.name_or_path = model.generation_config, model.name_or_path
    return alone.eval()


def save_in_shards(
    model: nn.Module, folder: Path, dtype: torch.dtype, shards: dict[Path, list[str]]
) -> bool:
    """Write the model in `dtype`; the files of finished blocks, {file: names}, become its shards.

    The files also remain in place, which takes no room on the same disk. Returns False and writes
    nothing if the names in a checkpoint of this model differ from those in the files.
    """
    inside = {name for each in shards.values() for name in each}
    held = {name: each.to("meta") for name, each in model.state_dict().items() if name in inside}
    if (
        getattr(model, "hf_quantizer", None)
        or revert_weight_conversion(model, held).keys() != inside
    ):
        return False
    with cast(model, dtype):
        rest = {name: value for name, value in model.state_dict().items() if name not in inside}
        model.save_pretrained(folder, state_dict=rest)
    count, weight_map, size = len(shards) + 1, {}, 0
    for number, file in enumerate([folder / WEIGHTS, *shards], 1):
        shard = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        with safe_open(file, framework="pt") as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
        size += tensor_bytes(file)
        try:
            os.link(file, shard)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file, shard)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return True


@contextmanager
def cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the model's floating-point parameters to their saved dtypes.

    Modules that the architecture always keeps in float32 (some routers) are not cast. Afterwards
    all parameters have their original dtypes, with the rounded values.
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

    If there are several (a multimodal model), it is the one whose blocks all read text. Raises
    UserError if there is none.
    """
    classes, unread = set(model._no_split_modules or ()), getattr(model, "unread", frozenset())

    def is_block(name: str, child: nn.Module) -> bool:
        read = any(f"{name}.{path}" not in unread for path, _ in child.named_parameters())
        return read and type(child).__name__ in classes

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(is_block(f"{name}.{index}", child) for index, child in enumerate(module))
    ]
    if len(lists) > 1 and isinstance(model.get_decoder(), nn.Module):
        inside = set(model.get_decoder().modules())
        lists = [(name, module) for name, module in lists if module in inside]
    if len(lists) != 1:
        raise UserError(
            f"--model {model.name_or_path} ({type(model).__name__})",
            f"it has {len(lists) or 'no'} lists of decoder blocks that process text "
            f"({', '.join(sorted(classes)) or 'it names no class of blocks'}), and one is "
            "required",
            "This architecture cannot be pruned",
        )
    return lists[0]


def footprint(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and torch's 2:4 tensors on any device; shared ones
    count once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in tensors) + semi_structured_bytes(model)


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the parameters saved in `dtype`; shared ones count once."""
    saved = SaveDtypes(model, dtype)
    return sum(one.numel() * saved.of(name, one).itemsize for name, one in model.named_parameters())
