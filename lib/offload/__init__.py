"""Weights outside the device: in files, or in shards on other ranks."""
