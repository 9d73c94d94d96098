"""Measures of how well a pruned model keeps the dense one's abilities and text."""
