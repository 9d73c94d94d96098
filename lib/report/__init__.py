"""Finished runs: their results.json, tables and pictures of many, and what masks share."""
