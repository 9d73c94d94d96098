"""Converts a saved folder to GGUF for llama.cpp and ollama, and proves that both agree."""

from ...run.flags import FLAGS, packed

QUANTIZE = next(flag for flag in FLAGS if flag.name == "quantize")
GRID_TYPES = [name for name in QUANTIZE.choices if not packed({"quantize": name})]
TYPES = ("f32", "f16", "bf16", "q8_0", *GRID_TYPES)  # of --type
INSTALL = "pip install -r requirements-gguf.txt"
