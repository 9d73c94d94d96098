"""Helpers for all folders: errors, progress bars, commands, files, locks, host memory."""
