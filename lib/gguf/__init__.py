"""A saved folder as a GGUF file for llama.cpp and ollama, and the proof that it does the same."""
