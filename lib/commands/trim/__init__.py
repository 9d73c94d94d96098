"""Trims the vocabulary of a GGUF file, by bytes, and proves what it has written."""
