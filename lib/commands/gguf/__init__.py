"""Converts a saved folder to GGUF for llama.cpp and ollama, and proves that both agree."""
