"""Text sources, documents, tokenizers and windows of token ids."""
