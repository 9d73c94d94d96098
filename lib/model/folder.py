"""The folder of a saved model that `gguf` or `export` converts."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ..formats.registry import EXPORTED, FORMATS
from ..packed.checkpoint import METHOD
from ..util.errors import UserError
from .checkpoint import Checkpoint
from .linears import linears_of
from .matrix import unread_of
from .pretrained import load_config, load_tokenizer
from .skeleton import build_skeleton, decoder_blocks


@dataclass(frozen=True)
class ModelFolder:
    """A folder with its config and tokenizer; `model` has no weights.

    The layers on the grid of q4_0 are `linears`, {tensor: whether it is (in, out)}, and `others`
    the modules of other linear layers. `is_plain`: no layer on the grid is in a stack or (in, out).
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module

    @classmethod
    def open(cls, path: str, flag: str) -> ModelFolder:
        """Read a folder; `flag` is its name in messages. Raises UserError if it is no model's."""
        if not (Path(path) / "config.json").is_file():
            raise UserError(
                f"{flag} {path}", "it is not a model folder (no config.json)", "Name one"
            )
        checkpoint = Checkpoint(path, flag)
        config, tokenizer = load_config(checkpoint), load_tokenizer(checkpoint)
        # raises if it would be far larger than the weights
        return cls(Path(path), config, tokenizer, build_skeleton(config, checkpoint))

    @property
    def quantized_by(self) -> str | None:
        """What quantized or packed the weights."""
        return (getattr(self.config, "quantization_config", None) or {}).get("quant_method")

    @property
    def is_packed(self) -> bool:
        return self.quantized_by == METHOD

    @property
    def is_multimodal(self) -> bool:
        """Whether it has a vision or audio part."""
        return bool(unread_of(self.model))

    @cached_property
    def tokenizer_data(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return json.loads(self.tokenizer.backend_tokenizer.to_str())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the folder."""
        return tensors_of(self.folder)

    @cached_property
    def _on_grid(self) -> dict[str, tuple[bool, bool]]:
        """{parameter: whether it is (in, out), whether it is in a stack}, as in the model."""
        prefix, blocks = decoder_blocks(self.model)
        return {
            each.parameter_name: (each.transposed, each.expert is not None)
            for each in linears_of(blocks, prefix)
            if FORMATS[EXPORTED].of(each.parameter_name, each.shape[1])
        }

    @cached_property
    def linears(self) -> dict[str, bool]:
        weights = {name: self.model.get_parameter(name) for name in self._on_grid}
        stored = revert_weight_conversion(self.model, weights)
        return {name: self._on_grid.get(name, (False,))[0] for name in stored}

    @property
    def others(self) -> list[str]:
        modules = self.model.named_modules()
        linears = [name for name, module in modules if isinstance(module, nn.Linear)]
        return [name for name in linears if f"{name}.weight" not in self._on_grid]

    @property
    def is_plain(self) -> bool:
        return not any(map(any, self._on_grid.values()))

    def copy_settings(self, new: Path, **fields: Any) -> None:
        """Copy the tokenizer and the configs, with more `fields` in config.json."""
        for file in self.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and "safetensors" not in file.name:
                shutil.copy2(file, new)
        config = json.loads((self.folder / "config.json").read_text("utf-8")) | fields
        (new / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, which are read from its files when they are used."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
