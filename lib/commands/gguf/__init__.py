"""Converts a saved folder to GGUF for llama.cpp and ollama."""
