"""Converts a saved folder to GGUF for llama.cpp and ollama, and proves that both agree."""

from ...run.plan import AUTO, QUANTIZED, packed

GRID_TYPES = [name for name in QUANTIZED if not packed({"quantize": name})]
TYPES = ("f32", "f16", "bf16", "q8_0", *GRID_TYPES, AUTO)  # of --type
INSTALL = "pip install -r requirements-gguf.txt"
