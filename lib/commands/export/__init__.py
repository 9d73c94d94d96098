"""Writes a folder of `--quantize q4_0` for other engines, and proves that no number changes."""
