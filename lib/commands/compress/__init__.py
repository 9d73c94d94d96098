"""Makes a model small for one language in a given time: plans by a rehearsal, runs main.py."""
