"""Run many prunings."""
