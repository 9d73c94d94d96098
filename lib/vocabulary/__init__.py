"""Trims a vocabulary: which tokens stay, tokenizer and tables, the cost and the proof."""
