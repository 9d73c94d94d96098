"""Compare GGUF files of a model by language."""
